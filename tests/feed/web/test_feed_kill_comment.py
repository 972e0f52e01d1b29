"""A server that is killed while people write: what it acknowledged is there, and there once."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa
from _visiting import PAPERS, _Forms

from pantarhei.feed import papers, schema
from pantarhei.feed.store import Store

SERVER = """
import sys
import uvicorn
from _visiting import NoSearch
from pantarhei.feed.store import Store
from pantarhei.feed.web.app import create_app

app = create_app(Store(sys.argv[1]), mode="local", searcher=NoSearch())
uvicorn.run(app, port=int(sys.argv[2]), log_level="warning", proxy_headers=False)
"""


class Served:
    """A server process of our own, which can be killed and started again."""

    def __init__(self, url: str) -> None:
        self.url = url
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        here = str(Path(__file__).parent)
        path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, self.url, str(self.port)],
            env=os.environ | {"PYTHONPATH": path},
        )
        for _ in range(600):
            try:
                httpx.get(f"http://127.0.0.1:{self.port}/login")
                return
            except httpx.TransportError:
                assert self.process.poll() is None, "the server did not start"
                time.sleep(0.05)
        raise AssertionError("the server did not start")

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def test_kill_9_during_comments_loses_and_doubles_nothing(new_url: Callable[[], str]) -> None:
    url = new_url()
    with Store(url) as store, store.write() as c:
        papers.add(c, PAPERS)
    served, chance = Served(url), random.Random(0)
    served.start()
    sent = killed = 0
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{served.port}", timeout=30) as client:
            page = client.get("/paper/paper-1").text
            [form] = [f for f in _Forms(page).forms if f.action.endswith("/comment")]
            left = chance.randrange(2, 20)  # comments until the next kill
            while killed < 4:
                # Every comment has words of its own; its form stays the same until it is taken.
                fields = form.fields | {"body": f"comment {sent}", "do": "send"}
                left -= 1
                if left < 0:
                    answer = _interrupted(served, client, form.action, fields, chance)
                    killed += 1
                    served.start()
                    left = chance.randrange(2, 20)
                else:
                    answer = client.post(form.action, data=fields)
                if answer is None:
                    answer = client.post(form.action, data=fields)  # as a person does: once more
                assert answer.status_code == 303, answer.text
                sent += 1
    finally:
        served.kill()
    with Store(url) as store, store.read() as c:
        bodies = Counter(c.execute(sa.select(schema.comments.c.body)).scalars())
        counted = c.execute(sa.select(schema.papers.c.comments)).scalars().all()
    assert bodies == {f"comment {n}": 1 for n in range(sent)}
    assert sum(counted) == sent  # the number beside the paper is in step


def _interrupted(
    served: Served, client: httpx.Client, action: str, fields: dict[str, str], chance: Any
) -> httpx.Response | None:
    """Kill the server while it is at a request; return the answer where it came all the same."""
    timer = threading.Timer(chance.uniform(0, 0.02), served.kill)
    timer.start()
    try:
        return client.post(action, data=fields)
    except httpx.TransportError:
        return None
    finally:
        timer.join()
