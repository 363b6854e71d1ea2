"""The kernels' Metal text on NVIDIA GPUs: translated, compiled by NVRTC, run where there is one.

python -m tests.metal_host.cuda.compile    # registers, spills, shared memory; needs no GPU
python -m tests.metal_host.cuda.run        # right or wrong, and what rows cost; needs one
"""
