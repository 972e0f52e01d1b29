"""The one exception a user should ever see."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RequestError(ValueError):
    """A request that cannot be served as it was made.

    The message is one sentence that names the input and says what to do instead. The command
    line prints it on stderr and exits with code 2; nothing has been written or overwritten.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name nearest to ``name``, or ``""``.

    >>> nearest("sortdnet", ["rbqe", "sortednet"])
    " Did you mean 'sortednet'?"
    """
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""
