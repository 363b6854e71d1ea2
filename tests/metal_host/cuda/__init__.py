"""The kernels' Metal text for NVIDIA GPUs: translated, and compiled by NVRTC.

python -m tests.metal_host.cuda.compile    # registers, spills, shared memory; needs no GPU
"""
