"""The page over the catalogue and its shipped results, for the tests of reading."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from _visiting import NoSearch
from starlette.testclient import TestClient

from pantarhei import papers
from pantarhei.feed import loading
from pantarhei.feed.store import Store
from pantarhei.feed.web.app import create_app

EVIDENCE = Path(papers.__file__).parent / "evidence"
LOCAL = "http://localhost:8000"


def filled(store: Store) -> Store:
    """Put the catalogue's cards and the shipped results into a store."""
    loading.load(store, evidence=EVIDENCE, ledger="/nowhere/ledger.sqlite")
    return store


def client(store: Store, mode: str = "local", **options: Any) -> TestClient:
    """A browser without JavaScript, of somebody on this machine; redirections are not followed."""
    options.setdefault("searcher", NoSearch())
    app = create_app(store, mode=mode, **options)  # type: ignore[arg-type]
    base = options.get("public_url") or LOCAL
    return TestClient(app, base_url=base, follow_redirects=False, raise_server_exceptions=False)


def text(html: str) -> str:
    """What a page says, without its markup."""
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def titles(html: str) -> list[str]:
    """The addresses of the papers a page lists, in order."""
    return re.findall(r'<h[23]><a href="/paper/([^"]+)">', html)
