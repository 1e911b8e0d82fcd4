"""The browser interface: `python app.py`, the same as `sds3d ui`."""

import sys

from sds3d.cli import main

if __name__ == "__main__":
    sys.exit(main(["ui", *sys.argv[1:]]))
