"""Commands: one file each. `cli.py` names them."""
