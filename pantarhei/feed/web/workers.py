"""Several processes that answer at one address: each connection goes to the next of them.

Processes that listen at one socket do not share its work: the first to wake takes every connection
that waits, and keeps them as long as browsers do. Here one process accepts and hands each
connection on in turn, as a file descriptor over a Unix socket; who is handed them is a process of
its own that serves them as if it had accepted them. One that ends is replaced.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from pantarhei.errors import RequestError

_LOOK = 0.5  # seconds between looks at whether all are alive
_PATIENCE = 1.0  # seconds that one may take to take a connection
_END = 10.0  # seconds that they have to finish what they are at

Serve = Callable[[Any, socket.socket], None]


def run(serve: Serve, plan: Any, listening: socket.socket, workers: int) -> None:
    """Hand what comes to ``listening`` to so many processes, until told to end.

    Each runs ``serve(plan, handed)``, both picklable, where ``handed`` is used like a listening
    socket. SIGINT and SIGTERM end them, and then this process as they always do.
    """
    if not hasattr(socket, "send_fds"):
        raise RequestError("Several processes need a Unix system: leave --workers out.")
    told: list[int] = []

    def end(number: int, _frame: FrameType | None) -> None:
        told.append(number)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    pool = [_Worker(serve, plan) for _ in range(workers)]
    try:
        listening.settimeout(_LOOK)
        while not told:
            for place, worker in enumerate(pool):
                if not worker.process.is_alive():
                    worker.end()
                    pool[place] = _Worker(serve, plan)
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                continue
            with connection:
                # who took the last one is asked last; one that is stuck is passed over
                for worker in pool[:]:
                    pool.append(pool.pop(0))
                    if worker.hand(connection):
                        break
    finally:
        for worker in pool:
            worker.process.terminate()
        for worker in pool:
            worker.end()
        for number, handler in before.items():
            signal.signal(number, handler)
    signal.raise_signal(told[0])


class Handed(socket.socket):
    """The end at which a process is handed connections; it accepts them as a listening socket does.

    >>> ours, theirs = socket.socketpair()
    >>> handed = Handed(fileno=theirs.detach())
    >>> there = socket.create_server(("127.0.0.1", 0))
    >>> _ = socket.create_connection(there.getsockname())
    >>> connection, address = there.accept()
    >>> _ = socket.send_fds(ours, [b"."], [connection.fileno()])
    >>> handed.accept()[1] == address
    True
    """

    def listen(self, backlog: int = 0) -> None:
        """Do nothing: somebody else listens."""

    def accept(self) -> tuple[socket.socket, Any]:
        """Return the next connection and its address."""
        mark, descriptors, _, _ = socket.recv_fds(self, 1, 1)
        if not mark:  # who handed them on is gone, and nothing will come any more
            os.kill(os.getpid(), signal.SIGTERM)
            raise BlockingIOError
        connection = socket.socket(fileno=descriptors[0])
        return connection, connection.getpeername()


class _Worker:
    def __init__(self, serve: Serve, plan: Any) -> None:
        self._channel, theirs = socket.socketpair()
        self._channel.settimeout(_PATIENCE)
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=_work, args=(serve, plan, theirs))
        self.process.start()
        theirs.close()

    def hand(self, connection: socket.socket) -> bool:
        try:
            socket.send_fds(self._channel, [b"."], [connection.fileno()])
        except OSError:  # it ended, or is stuck
            return False
        return True

    def end(self) -> None:
        self.process.join(_END)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self._channel.close()


def _work(serve: Serve, plan: Any, channel: socket.socket) -> None:
    with suppress(KeyboardInterrupt):  # who began this process says what is to be said
        serve(plan, Handed(fileno=channel.detach()))
