"""Prompts and answers as text: chat templates, tools, ids to text, reasoning."""
