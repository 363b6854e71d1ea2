"""Reading PyTorch checkpoints safely."""
