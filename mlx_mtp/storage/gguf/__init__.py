"""GGUF files, the model format of llama.cpp: read strictly, written as mlx-lm model folders."""

SUFFIX = ".gguf"
WRITER_VERSION = 1  # raise it when written folders change, so that old copies are rewritten
