"""The page itself: HTML for people, Atom for feed readers, JSON for programs; see :mod:`.app`."""
