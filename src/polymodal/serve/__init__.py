"""Answering many at once."""
