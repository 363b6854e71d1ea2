"""PyTorch as a back-end: bfloat16 on CPUs with instructions for it, and NVIDIA GPUs."""
