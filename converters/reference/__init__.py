"""Comparing a converted model with PyTorch."""
