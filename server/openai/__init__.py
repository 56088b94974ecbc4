"""OpenAI-shaped routes: schemas, completions, chat, models, server-sent events."""
