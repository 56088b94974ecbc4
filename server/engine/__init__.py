"""The engine: one child process that batches, schedules and steps, and the asyncio client of it."""
