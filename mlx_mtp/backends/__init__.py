"""How the layers of a model compute on this machine."""
