"""Time, requests and HTTP. Knows nothing of mathematics: only `engine.runner` imports `models`."""

__version__ = "0.1.0"
