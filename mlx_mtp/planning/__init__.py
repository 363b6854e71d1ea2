"""Policies: which rows the next step has.  NumPy only."""
