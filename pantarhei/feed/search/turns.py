"""As many searches at once as there are processors, in the order in which they came.

A search goes in and out of the interpreter's lock a hundred times, around SQLite, NumPy and FAISS.
Sixteen threads that do so at once wait for that lock most of the time; sixteen that wait for their
turn answer half as many again, and none waits much longer than another.
"""

from __future__ import annotations

import os
import threading
from collections import deque


def processors() -> int:
    """Return how many processors this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class Turns:
    """A semaphore that is fair: who waits longest comes first.

    >>> turns = Turns(2)
    >>> with turns:
    ...     pass
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._lock = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._lock:
            if self._free:
                self._free -= 1
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        try:
            mine.acquire()  # until who leaves hands the place over
        except BaseException:  # interrupted: give back what may have been handed over meanwhile
            with self._lock:
                if mine in self._waiting:
                    self._waiting.remove(mine)
                    raise
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._free += 1
