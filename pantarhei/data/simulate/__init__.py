"""Generators of data: each names its equations and its solver."""
