"""Folders, files, safetensors, model cards, the default model and paths."""
