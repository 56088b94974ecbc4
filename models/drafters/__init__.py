"""Drafters: how the next tokens are guessed."""
