"""Converting the base model: weights, configuration and shards."""
