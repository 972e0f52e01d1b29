"""Visiting the page as a browser without JavaScript does: links, forms, cookies, redirections."""

from __future__ import annotations

import email
import email.policy
import re
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urlsplit

import sqlalchemy as sa
from starlette.testclient import TestClient

from pantarhei.feed import mail, papers, schema
from pantarhei.feed.store import Store
from pantarhei.feed.web.app import create_app

PUBLIC = "https://papers.example"
PAPERS = [
    {
        "key": f"paper-{n}",
        "title": f"Paper {n} on early exits",
        "summary": "A network that stops when it is sure.",
        "date": f"2026-01-{n:02d}",
        "authors": ["Ada Lovelace", "Charles Babbage"],
        "wing": "compute",
        "source": "json",
    }
    for n in (1, 2, 3)
]


class NoSearch:
    """Stands where search is not what a test is about, and starts no thread."""

    def refresh(self) -> None:
        """Index nothing."""

    def prompt(self, query: str) -> bool:
        """Let a thread answer."""
        return False

    def related(self, paper: int, n: int = 5) -> list[Any]:
        """Know nothing."""
        return []


def application(store: Store, mode: str = "shared", **options: Any) -> Any:
    """The whole page over a store that holds three papers, with mail that nobody sends."""
    with store.write() as c:
        papers.add(c, PAPERS)
    public = PUBLIC if mode == "shared" else None
    url = options.pop("public_url", public)
    return create_app(
        store,
        mode=mode,  # type: ignore[arg-type]
        public_url=url,
        searcher=NoSearch(),  # type: ignore[arg-type]
        letterhead=mail.Letterhead(url or PUBLIC, store.secret, "page <page@papers.example>"),
        **options,
    )


class Form:
    """A form as it stands in a page."""

    def __init__(self, attributes: dict[str, str]) -> None:
        self.action = attributes.get("action", "")
        self.method = attributes.get("method", "get")
        self.fields: dict[str, str] = {}


class _Forms(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.forms: list[Form] = []
        self._text: str | None = None
        self._inside = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "form":
            self.forms.append(Form(given))
            self._inside = True
        elif self._inside and tag == "input":
            chosen = given.get("type") not in ("radio", "checkbox") or "checked" in given
            if "name" in given and chosen:
                self.forms[-1].fields[given["name"]] = given.get("value", "")
        elif self._inside and tag == "textarea":
            self._text = given["name"]
            self.forms[-1].fields[self._text] = ""

    def handle_data(self, data: str) -> None:
        if self._text:
            fields = self.forms[-1].fields
            fields[self._text] = (fields[self._text] + data).removeprefix("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag == "textarea":
            self._text = None
        elif tag == "form":
            self._inside = False


class Visitor:
    """Somebody with a browser of their own."""

    def __init__(self, app: Any, base: str, peer: str = "127.0.0.1") -> None:
        self.client = TestClient(app, base_url=base, client=(peer, 5000), follow_redirects=False)
        self.page: Any = None

    def open(self, path: str, status: int = 200) -> str:
        """Go to a path; follow what it redirects to."""
        self.page = self.client.get(path)
        while self.page.is_redirect:
            assert urlsplit(self.page.headers["location"]).netloc == ""  # always on this page
            self.page = self.client.get(self.page.headers["location"])
        assert self.page.status_code == status, self.page.text
        return str(self.page.text)

    def form(self, action: str) -> Form:
        """The form of the page that is open whose action ends so."""
        found = [form for form in _Forms(self.page.text).forms if form.action.endswith(action)]
        assert found, f"no form '{action}' in {self.page.text}"
        assert found[0].method == "post"
        return found[0]

    def send(self, action: str, status: int = 303, **changes: str) -> Any:
        """Fill in that form and send it; return the answer, not followed."""
        form = self.form(action)
        answer = self.client.post(form.action, data=form.fields | changes)
        assert answer.status_code == status, answer.text
        return answer

    def press(self, action: str, **changes: str) -> str:
        """Send that form and follow where it leads."""
        return self.open(self.send(action, **changes).headers["location"])

    def log_in(self, store: Store, email: str, next: str = "/") -> str:
        """Ask for a link, find it in the outbox, and use it."""
        self.open(f"/login?next={next}")
        self.press("/login", email=email)
        self.open(last_link(store, email))
        return self.press(urlsplit(last_link(store, email)).path)


def messages(store: Store, recipient: str) -> list[str]:
    """The text of each message queued for somebody, oldest first."""
    outbox = schema.outbox
    query = sa.select(outbox.c.message).where(outbox.c.recipient == recipient)
    with store.read() as c:
        rows = c.execute(query.order_by(outbox.c.id)).scalars().all()
    parsed = [email.message_from_bytes(row, policy=email.policy.default) for row in rows]
    return [str(message.get_body(("plain",)).get_content()) for message in parsed]  # type: ignore[union-attr]


def last_link(store: Store, recipient: str, base: str = PUBLIC) -> str:
    """The path of the first link in the newest message for somebody."""
    found = re.search(rf"{re.escape(base)}(/\S+)", messages(store, recipient)[-1])
    assert found
    return found[1]
