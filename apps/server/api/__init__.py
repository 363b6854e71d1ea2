"""HTTP dialects: OpenAI chat, completions and responses, and Anthropic messages."""
