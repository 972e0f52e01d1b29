"""What made the store's tables what they are, step by step, for Alembic.

``versions/<number>_<what>.py`` are applied in order, all in one transaction. Write a new one for
every change of :mod:`pantarhei.feed.schema`; those that are there never change.
"""
