"""The files, display and report of a training run."""
