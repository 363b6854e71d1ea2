"""Modules for multi-token prediction that come with a model's own checkpoint."""
