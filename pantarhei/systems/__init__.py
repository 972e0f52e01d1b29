"""Learned dynamics that run forward: fields, graphs, series."""
