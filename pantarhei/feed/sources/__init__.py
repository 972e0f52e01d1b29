"""Where papers come from: arXiv's API and OAI-PMH interface, BibTeX and JSON files.

Every source yields :class:`~pantarhei.feed.sources.entry.Entry` objects, checked and cleaned; what
they are stored as is decided in :mod:`pantarhei.feed.papers`, how a store grows by them in
:mod:`pantarhei.feed.sources.growing`.
"""
