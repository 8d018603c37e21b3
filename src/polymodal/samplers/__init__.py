"""Loops that turn scores into answers."""
