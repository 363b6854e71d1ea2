"""Losses and gradients of one training step."""
