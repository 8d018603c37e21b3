"""Continuous towers."""
