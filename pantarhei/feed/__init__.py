"""The page: a research feed whose papers run.

:mod:`.store` keeps everything in one database, SQLite or PostgreSQL; :mod:`.papers`,
:mod:`.trends` and :mod:`.people` read and write it inside a transaction that the caller opens.
"""
