"""`python -m mole_diffusers` is the `mole` command: what `accelerate launch -m` starts."""

import sys

from mole_diffusers.cli.mole import main

if __name__ == "__main__":
    sys.exit(main())
