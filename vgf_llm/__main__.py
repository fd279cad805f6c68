import sys

from vgf_llm.cli import main


if __name__ == "__main__":
    sys.exit(main())
