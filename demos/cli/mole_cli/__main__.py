"""`python -m mole_cli` is the `mole` command: what `accelerate launch -m` starts."""

import sys

from mole_cli.mole import main

if __name__ == "__main__":
    sys.exit(main())
