"""The engine: the child process that runs the model, and its supervisor."""
