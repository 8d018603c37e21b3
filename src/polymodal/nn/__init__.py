"""Leaves: the learned layers that every part is made of."""
