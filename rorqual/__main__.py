"""Runs the command `rorqual` for `python -m rorqual`."""

import sys

from rorqual.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
