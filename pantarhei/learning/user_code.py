"""A user's own functions, named on a command line."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pantarhei.errors import RequestError


def load_function(text: str, what: str) -> Callable[..., Any]:
    """Import ``module:function`` or ``path/to/file.py:function``.

    Raises :class:`RequestError` with the reason where that fails.
    """
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise RequestError(
            f"{what} '{text}' is not of the form file.py:function or module:function."
        )
    try:
        if place.endswith(".py"):
            if not Path(place).is_file():
                raise RequestError(f"{what}: there is no file '{place}'.")
            stem = f"_pantarhei_{Path(place).stem}"
            spec = importlib.util.spec_from_file_location(stem, place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[stem] = module  # dataclasses and pickle look it up there
            sys.path.insert(0, str(Path(place).resolve().parent))
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, os.getcwd())
            module = importlib.import_module(place)
    except RequestError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise RequestError(f"{what} '{place}' cannot be imported ({reason}).") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise RequestError(
            f"{what} '{text}' cannot be imported: '{place}' has no function '{name}'."
        )
    return found
