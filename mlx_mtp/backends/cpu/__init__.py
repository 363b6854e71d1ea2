"""Linux CPUs: OpenBLAS, float32 weights and faster elementwise functions."""
