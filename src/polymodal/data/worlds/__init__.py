"""Worlds: pictures made by others for other purposes, or rendered with exact truth. Nothing is vendored.

``pictograms`` draws on emoji fonts, icon themes and clip art that the system's package manager installs by name;
``shapes`` renders small scenes whose every fact is known.
"""
