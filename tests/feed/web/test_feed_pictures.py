"""The plots of a run: only what its folder lists, and nothing that a link or a name leads to."""

from __future__ import annotations

import os
import struct
import zlib

import pytest
import sqlalchemy as sa
from _reading import client, filled

from pantarhei.feed import papers, schema
from pantarhei.feed.web import pictures

SVG = '<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\xff" * width) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture
def folder(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "claims.json").write_text("{}")
    (run / "frontier.png").write_bytes(png(30, 20))
    (run / "frontier.svg").write_text(SVG)
    (run / "only-vector.svg").write_text(SVG)
    (run / "seed").write_text("0")
    (run / "metrics.csv").write_text("secret")
    (run / ".hidden.png").write_bytes(png(1, 1))
    outside = tmp_path / "outside.png"
    outside.write_bytes(png(2, 2))
    (run / "link.png").symlink_to(outside)
    (run / "folder.png").mkdir()
    return run


@pytest.fixture
def browser(store, folder):
    with filled(store).write() as c:
        paper = papers.get(c, "rbqe").id
        runs = schema.runs
        c.execute(sa.update(runs).where(runs.c.paper == paper).values(folder=str(folder)))
    return client(store)


def test_the_page_shows_them_with_their_size(browser):
    page = browser.get("/paper/rbqe").text
    assert page.count("<img") == 2
    assert (
        'src="/paper/rbqe/figure/0" alt="Plot: frontier" loading="lazy" width="30" height="20"'
        in page
    )
    assert "Plots of the newest run" in page and "/outside" not in page


def test_they_are_sent_as_what_they_are(browser, folder):
    first = browser.get("/paper/rbqe/figure/0")
    assert first.headers["content-type"] == "image/png"
    assert first.content == (folder / "frontier.png").read_bytes()
    tag = {"if-none-match": first.headers["etag"]}
    assert browser.get("/paper/rbqe/figure/0", headers=tag).status_code == 304
    for path in ("/paper/rbqe/figure/0?vector=1", "/paper/rbqe/figure/1"):
        vector = browser.get(path)
        assert vector.headers["content-type"].startswith("image/svg+xml")
        policy = vector.headers["content-security-policy"]
        assert "sandbox" in policy and "default-src 'none'" in policy and "script" not in policy
        assert vector.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "name",
    ["2", "-1", "link.png", "metrics.csv", "..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "0%00"],
)
def test_nothing_else_is(browser, name):
    answer = browser.get(f"/paper/rbqe/figure/{name}")
    assert answer.status_code in (400, 404, 422) and b"secret" not in answer.content


def test_a_file_that_became_a_link_is_not_followed(folder, tmp_path):
    (folder / "frontier.png").unlink()
    (folder / "frontier.png").symlink_to(tmp_path / "outside.png")
    assert pictures.content(folder / "frontier.png") is None
    assert [plot.path.name for plot in pictures.plots(str(folder))] == [
        "frontier.svg",
        "only-vector.svg",
    ]


def test_what_only_says_that_it_is_a_png_is_not_sent(folder):
    (folder / "frontier.png").write_bytes(b"<html>")
    assert pictures.content(folder / "frontier.png") is None
    assert pictures.plots(str(folder))[0].width == 0


def test_a_pipe_does_not_keep_anybody_waiting(folder):
    os.mkfifo(folder / "a.png")
    assert pictures.content(folder / "a.png") is None
    assert pictures.plots(str(folder))[0].path.name == "frontier.png"


def test_no_folder_no_plots(browser, folder, store):
    (folder / "claims.json").unlink()  # the run is not finished
    assert "<img" not in browser.get("/paper/rbqe").text
    for name in ("", "relative/folder", "/nowhere", "/etc"):
        assert pictures.plots(name) == []
    assert "<img" not in client(store).get("/paper/pdlt").text
