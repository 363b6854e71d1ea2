"""Metal kernels: launchers, checks, benchmarks and the choice between them."""
