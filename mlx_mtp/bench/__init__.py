"""Measurements: commands that print one JSON line, never timed tests."""
