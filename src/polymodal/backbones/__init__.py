"""Transformers that reason over tokens of every modality."""
