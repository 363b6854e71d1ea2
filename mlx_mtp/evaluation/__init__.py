"""Acceptance on given texts, and the prompt sets that commands share."""
