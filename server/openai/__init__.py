"""OpenAI-shaped routes: schemas, completions, chat, responses, models, tokens, server-sent events."""
