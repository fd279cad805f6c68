"""Data sets for demonstrations and measurements. A leaf: imports nothing else of this package."""
