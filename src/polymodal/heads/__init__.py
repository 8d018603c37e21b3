"""Output maps and their losses."""
