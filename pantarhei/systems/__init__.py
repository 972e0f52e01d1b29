"""Forecasters of changing things: graphs, fields and series that are run forward."""
