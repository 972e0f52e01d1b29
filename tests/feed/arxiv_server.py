"""A local server that answers as arXiv's API and OAI-PMH interface do, faults included."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape, quoteattr

ATOM = "application/atom+xml; charset=UTF-8"
XML = "text/xml; charset=utf-8"


@dataclass
class Reply:
    """What is sent: ``cut`` bytes of the body where it breaks off, ``drip`` seconds per piece."""

    body: bytes = b""
    status: int = 200
    kind: str = ATOM
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    drip: float = 0.0


@dataclass(frozen=True)
class Paper:
    id: str
    published: str
    title: str = "A title\n  over two lines"
    summary: str = "  An abstract\nof two lines.\n"
    authors: tuple[tuple[str, str], ...] = (("Ada", "Lovelace"), ("Alan", "Turing"))
    categories: tuple[str, ...] = ("cs.LG", "stat.ML")
    version: int = 1
    comment: str = ""
    doi: str = ""
    changed: str = ""  # the day of the last change
    deleted: bool = False


def papers(count: int, day: str = "2026-01-05", **more: Any) -> list[Paper]:
    """Return papers of one day, a minute apart."""
    return [
        Paper(
            f"{day[2:4]}{day[5:7]}.{day[8:]}{number:03}",
            f"{day}T{number // 60:02}:{number % 60:02}:30Z",
            title=f"Paper {number} of {day}",
            **more,
        )
        for number in range(1, count + 1)
    ]


def atom_entry(paper: Paper) -> str:
    authors = "".join(
        f"<author><name>{escape(first)} {escape(last)}</name>"
        "<arxiv:affiliation>Somewhere</arxiv:affiliation></author>"
        for first, last in paper.authors
    )
    categories = "".join(
        f'<category term={quoteattr(term)} scheme="http://arxiv.org/schemas/atom"/>'
        for term in (*paper.categories, "68T05", "I.2.6")
    )
    comment = f"<arxiv:comment>{escape(paper.comment)}</arxiv:comment>" if paper.comment else ""
    doi = f"<arxiv:doi>{escape(paper.doi)}</arxiv:doi>" if paper.doi else ""
    return f"""<entry>
    <id>http://arxiv.org/abs/{paper.id}v{paper.version}</id>
    <updated>{paper.published}</updated><published>{paper.published}</published>
    <title>{escape(paper.title)}</title><summary>{escape(paper.summary)}</summary>
    {authors}{comment}{doi}
    <link href="http://arxiv.org/abs/{paper.id}v{paper.version}" rel="alternate"/>
    <arxiv:primary_category term={quoteattr(paper.categories[0])}/>{categories}
    </entry>"""


def atom(entries: str, total: int, start: int = 0) -> bytes:
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<feed xmlns="http://www.w3.org/2005/Atom" xmlns:arxiv="http://arxiv.org/schemas/atom"
      xmlns:opensearch="http://a9.com/-/spec/opensearch/1.1/">
  <link href="http://arxiv.org/api/query" rel="self" type="application/atom+xml"/>
  <title type="html">ArXiv Query</title><id>http://arxiv.org/api/x</id>
  <updated>2026-01-09T00:00:00-05:00</updated>
  <opensearch:totalResults>{total}</opensearch:totalResults>
  <opensearch:startIndex>{start}</opensearch:startIndex>
  <opensearch:itemsPerPage>10</opensearch:itemsPerPage>
  {entries}
</feed>""".encode()


def atom_error(message: str) -> bytes:
    return atom(
        "<entry><id>http://arxiv.org/api/errors#x</id><title>Error</title>"
        f"<summary>{escape(message)}</summary><author><name>arXiv api core</name></author></entry>",
        1,
    )


def oai(content: str) -> bytes:
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<OAI-PMH xmlns="http://www.openarchives.org/OAI/2.0/">
<responseDate>2026-01-09T10:00:00Z</responseDate>
<request verb="ListRecords">http://oaipmh.arxiv.org/oai</request>
{content}</OAI-PMH>""".encode()


def oai_error(code: str, message: str = "") -> bytes:
    return oai(f"<error code={quoteattr(code)}>{escape(message)}</error>")


def oai_record(paper: Paper) -> str:
    header = (
        f"<identifier>oai:arXiv.org:{paper.id}</identifier>"
        f"<datestamp>{paper.changed or paper.published[:10]}</datestamp><setSpec>cs:cs:LG</setSpec>"
    )
    if paper.deleted:
        return f'<record><header status="deleted">{header}</header></record>'
    authors = "".join(
        f"<author><keyname>{escape(last)}</keyname><forenames>{escape(first)}</forenames></author>"
        for first, last in paper.authors
    )
    return f"""<record><header>{header}</header><metadata>
<arXiv xmlns="http://arxiv.org/OAI/arXiv/"><id>{paper.id}</id>
<created>{paper.published[:10]}</created><authors>{authors}</authors>
<title>{escape(paper.title)}</title><categories>{" ".join(paper.categories)}</categories>
<comments>{escape(paper.comment)}</comments><doi>{escape(paper.doi)}</doi>
<abstract>{escape(paper.summary)}</abstract></arXiv></metadata></record>"""


class Arxiv:
    """The server: ``faults`` are sent before anything else, one for each request."""

    def __init__(self, page: int = 2) -> None:
        self.papers: list[Paper] = []
        self.page = page  # of OAI-PMH; the API sends no more than
        self.api_page = 2_000
        self.faults: list[Reply | None] = []  # None: the proper answer
        self.requests: list[dict[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.tokens: dict[str, tuple[list[Paper], int]] = {}
        self.before: Callable[[], None] = lambda: None  # called before each answer
        self.now = self.most = 0  # requests being answered: at this moment, and at most
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                with server._lock:
                    server.now += 1
                    server.most = max(server.most, server.now)
                try:
                    self._reply(server.answer(self.path, dict(self.headers)))
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                finally:
                    with server._lock:
                        server.now -= 1

            def _reply(self, reply: Reply) -> None:
                self.send_response(reply.status)
                self.send_header("Content-Type", reply.kind)
                self.send_header("Content-Length", str(len(reply.body)))
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                body = reply.body if reply.cut is None else reply.body[: reply.cut]
                if reply.drip:
                    for byte in body:
                        self.wfile.write(bytes([byte]))
                        self.wfile.flush()
                        time.sleep(reply.drip)
                else:
                    self.wfile.write(body)
                if reply.cut is not None:
                    self.close_connection = True

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @contextlib.contextmanager
    def running(self) -> Iterator[Arxiv]:
        self._thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def answer(self, path: str, headers: dict[str, str]) -> Reply:
        asked = {k: v[0] for k, v in parse_qs(urlsplit(path).query).items()}
        with self._lock:
            self.requests.append(asked)
            self.headers.append(headers)
            fault = self.faults.pop(0) if self.faults else None
        self.before()
        if fault is not None:
            return fault
        if urlsplit(path).path == "/oai":
            return Reply(self._oai(asked), kind=XML)
        return Reply(self._api(asked))

    def _api(self, asked: dict[str, str]) -> bytes:
        start, most = int(asked.get("start", 0)), int(asked.get("max_results", 10))
        most = min(most, self.api_page)
        if "id_list" in asked:
            found = [p for i in asked["id_list"].split(",") for p in self.papers if p.id == i]
        else:
            query = re.fullmatch(
                r"cat:(\S+) AND submittedDate:\[(\d{12}) TO (\d{12})\]", asked["search_query"]
            )
            assert query, asked
            assert (asked["sortBy"], asked["sortOrder"]) == ("submittedDate", "ascending")
            found = sorted(
                (
                    p
                    for p in self.papers
                    if query[1] in p.categories and query[2] <= minute(p) <= query[3]
                ),
                key=lambda p: p.published,
            )
        return atom("".join(map(atom_entry, found[start : start + most])), len(found), start)

    def _oai(self, asked: dict[str, str]) -> bytes:
        assert asked.pop("verb") == "ListRecords"
        if "resumptionToken" in asked:
            assert len(asked) == 1
            if asked["resumptionToken"] not in self.tokens:
                return oai_error("badResumptionToken", "The value is invalid or expired.")
            found, begin = self.tokens[asked["resumptionToken"]]
        else:
            assert asked["metadataPrefix"] == "arXiv"
            category = ".".join(asked["set"].split(":")[1:])
            days = (asked["from"], asked["until"])
            found = [
                p
                for p in self.papers
                if category in p.categories
                and days[0] <= (p.changed or p.published[:10]) <= days[1]
            ]
            begin = 0
        if not found:
            return oai_error("noRecordsMatch", "No records match the request.")
        records = "".join(map(oai_record, found[begin : begin + self.page]))
        token = ""
        if begin + self.page < len(found):
            token = f"{found[0].published[:10]}|{begin + self.page}"
            self.tokens[token] = (found, begin + self.page)
        return oai(
            f"<ListRecords>{records}<resumptionToken>{token}</resumptionToken></ListRecords>"
        )


def minute(paper: Paper) -> str:
    return re.sub(r"\D", "", paper.published)[:12]
