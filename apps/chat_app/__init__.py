"""The local chat app: a page, its history, and the routes between it and the engine."""
