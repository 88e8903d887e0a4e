"""`python -m rorqual` in -> what the command `rorqual` does out."""

import sys

from rorqual.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
