"""Checkpoints of other projects in, MLX folders out."""
