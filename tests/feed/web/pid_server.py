"""A server of several processes, each of which answers a connection with its number."""

import os
import socket

from pantarhei.feed.web import workers


def serve(plan: bytes, handed: socket.socket) -> None:
    handed.setblocking(True)
    while True:
        connection, _ = handed.accept()
        with connection:
            connection.sendall(b"%s %d" % (plan, os.getpid()))


if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as listening:
        print(listening.getsockname()[1], flush=True)
        workers.run(serve, b"hello", listening, 2)
