"""Named data sets: ``load(name)`` finds one, ``located()`` tells where each was found.

Looked for, in this order: the path given; the folder ``PANTARHEI_DATA``; the user's cache; then the
data set's own public address, where it has one with a checksum. ``digits`` and ``photographs``
come with installed packages and are always there.
"""

from pantarhei.data._sets import (
    Events,
    Images,
    Labelled,
    Location,
    cache,
    load,
    located,
    names,
)

__all__ = ["Events", "Images", "Labelled", "Location", "cache", "load", "located", "names"]
