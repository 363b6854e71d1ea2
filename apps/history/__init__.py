"""Conversations in SQLite: messages form a tree, so that no message is overwritten."""
