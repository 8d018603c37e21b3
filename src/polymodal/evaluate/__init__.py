"""Metrics and evaluation cards."""
