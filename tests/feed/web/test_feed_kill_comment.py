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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import httpx
import sqlalchemy as sa
from _visiting import PAPERS, _Forms

from pantarhei.feed import papers, schema
from pantarhei.feed.store import Store

SERVER = """
import os
import signal
import sys
from pathlib import Path

import uvicorn
from _visiting import NoSearch
from pantarhei.feed.store import Store
from pantarhei.feed.web.app import create_app

app = create_app(Store(sys.argv[1]), mode="local", searcher=NoSearch())
dies = Path(sys.argv[3])  # where this is, the server dies with its next answer on its lips


async def mortal(scope, receive, send):
    async def answer(message):
        if message["type"] == "http.response.start" and dies.exists():
            dies.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        await send(message)

    await app(scope, receive, answer)


uvicorn.run(mortal, port=int(sys.argv[2]), log_level="warning", proxy_headers=False)
"""


class Served:
    """A server process of our own, which can be killed and started again."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.dies = url, folder / "dies"
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self.process is not None:
            self.process.wait()
        here = str(Path(__file__).parent)
        path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, self.url, str(self.port), str(self.dies)],
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


def test_kill_9_during_comments_loses_and_doubles_nothing(
    new_url: Callable[[], str], tmp_path: Path
) -> None:
    url = new_url()
    with Store(url) as store, store.write() as c:
        papers.add(c, PAPERS)
    served, chance = Served(url, tmp_path), random.Random(0)
    served.start()
    sent = unanswered = 0
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{served.port}", timeout=30) as client:
            page = client.get("/paper/paper-1").text
            [form] = [f for f in _Forms(page).forms if f.action.endswith("/comment")]
            for kill in (at_its_answer, at_any_time, at_any_time):
                for left in reversed(range(chance.randrange(2, 20))):
                    # Every comment has words of its own; they are sent until they are taken.
                    fields = form.fields | {"body": f"comment {sent}", "do": "send"}
                    try:
                        with kill(served, chance) if left == 0 else nullcontext():
                            answer = client.post(form.action, data=fields)
                    except httpx.TransportError:
                        unanswered += 1
                        served.start()
                        answer = client.post(form.action, data=fields)  # as a person does
                    assert answer.status_code == 303, answer.text
                    sent += 1
    finally:
        served.kill()
    assert unanswered >= 2
    with Store(url) as store, store.read() as c:
        bodies = Counter(c.execute(sa.select(schema.comments.c.body)).scalars())
        counted = c.execute(sa.select(schema.papers.c.comments)).scalars().all()
    assert bodies == {f"comment {n}": 1 for n in range(sent)}
    assert sum(counted) == sent  # the number beside the paper is in step


@contextmanager
def at_its_answer(served: Served, _: random.Random) -> Iterator[None]:
    """Kill the server when the comment is committed and nothing of the answer is sent."""
    served.dies.touch()
    yield


@contextmanager
def at_any_time(served: Served, chance: random.Random) -> Iterator[None]:
    """Kill the server somewhere within the request, or shortly after."""
    timer = threading.Timer(chance.uniform(0, 0.02), served.kill)
    timer.start()
    try:
        yield
    finally:
        timer.join()
