"""Training an adapter: the model teaches itself its own future."""
