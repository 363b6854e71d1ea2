"""The local chat app: the page, its history, and the routes to the engine."""
