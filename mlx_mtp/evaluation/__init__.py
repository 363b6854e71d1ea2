"""Acceptance on existing texts, and what training, benchmarks and simulation share."""
