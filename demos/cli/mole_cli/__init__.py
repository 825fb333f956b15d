"""The commands of `mole`, one file each, or one for a few that share their work; `mole.py` lists them."""
