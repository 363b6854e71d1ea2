"""Converting tokenizers."""
