"""`python -m sds3d` is the `sds3d` command."""

import sys

from sds3d.cli import main

if __name__ == "__main__":
    sys.exit(main())
