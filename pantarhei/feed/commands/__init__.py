"""The page's commands, one file each; what they share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pantarhei.errors import RequestError


@contextmanager
def installed() -> Iterator[None]:
    """Import what the page is made of in here: what is missing becomes one sentence."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("pantarhei"):
            raise
        raise RequestError(
            f"The page needs {error.name}, which is not installed: pip install 'pantarhei[feed]'."
        ) from error


def say(line: str) -> None:
    """Tell the user something beside the result."""
    print(line, file=sys.stderr, flush=True)
