"""Tensors. Knows no clock, no request, no HTTP, and never imports `server`."""
