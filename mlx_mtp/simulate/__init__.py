"""Simulates decoding on machines of which only the step costs are known."""
