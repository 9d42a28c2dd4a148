"""How the shipped model was made: each a module, `python -m demo.NAME`."""
