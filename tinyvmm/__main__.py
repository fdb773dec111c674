"""`python -m tinyvmm`."""

import sys

from tinyvmm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
