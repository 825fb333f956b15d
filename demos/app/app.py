"""Start the app on the embedded emoji world, or on your own checkpoint and LoRA folder.

python demos/app/app.py [--base MODEL --loras FOLDER]
"""

import sys

from mole_cli.mole import main

sys.exit(main(["app", *sys.argv[1:]]))
