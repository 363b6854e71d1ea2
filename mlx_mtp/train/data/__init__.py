"""Training data: sources, generated answers, records and batches of sequences."""
