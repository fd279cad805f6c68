"""Measurements: what the method gives beside best-of-n and its own controls. Nothing below imports it."""
