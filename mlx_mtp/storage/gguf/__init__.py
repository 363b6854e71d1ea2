"""GGUF files, the model format of llama.cpp: read strictly, written as mlx-lm model folders."""
