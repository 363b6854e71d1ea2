"""Drafters: what proposes the tokens that a step verifies."""
