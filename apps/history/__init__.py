"""Conversations kept in SQLite: messages as a tree, so that nothing said is overwritten."""
