"""Policies that act: environments, the closed loop, the guard, and serving."""
