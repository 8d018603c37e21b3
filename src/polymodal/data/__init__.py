"""Data sets, their order, and the worlds that a computer can render."""
