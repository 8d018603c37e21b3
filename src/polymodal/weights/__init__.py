"""Checkpoints: rules as data, total loading, streaming files, the Hub."""
