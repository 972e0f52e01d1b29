from __future__ import annotations

import csv
import io
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantarhei.feed import export
from pantarhei.feed.papers import Paper
from pantarhei.feed.sources import bibtex
from pantarhei.feed.sources.entry import line

TITLES = [
    "Deep & wide: 50% of R&D_1 #2 ~ ^ at $5",
    "A {brace} and an unbalanced } one {",
    r"Backslash \input{/etc/passwd} \write18{ls} \end{document}",
    "Formulas $\\alpha$, $O(n^{2})$ and $\\mathcal{L}_{1}$ stay",
    "no formula: $\\input{x}$ $\\def\\x{y}$ $}{$ $a",
    "$5 and $6 -- ``quoted'' --- 'single' ?` !`",
    'a "quote", @misc{x, title={y}} and a comma,',
    "Ünïcödé 深度学习 — ελληνικά 🙂",
    "$^^5cinput x$ $x^2$",
    "%",
    "\\",
]


def paper(**changes) -> Paper:
    fields = dict(
        id=1,
        key="smith2020",
        title="A title",
        summary="An abstract",
        date="2020-05-06",
        authors=("Ann Smith", "Jan van der Berg"),
        authors_count=2,
        arxiv="2005.00001",
        doi="10.1000/a_b",
        code="https://example.org/a_b?c=d&e=%20",
        categories="cs.LG stat.ML",
        wing=None,
        source="arxiv",
        status="listed",
        added=0.0,
        changed=0.0,
        votes=2,
        comments=1,
        held=0,
        measured=0,
        heat=0.0,
    )
    return Paper(**(fields | changes))


def again(*papers: Paper):
    return bibtex.read("".join(export.bibtex(papers)), "x.bib")


def test_an_entry():
    assert "".join(export.bibtex([paper()])) == (
        "@misc{smith2020,\n"
        "  title = {{A title}},\n"
        "  author = {Ann Smith and Jan van der Berg},\n"
        "  year = {2020},\n"
        "  month = may,\n"
        "  day = {6},\n"
        "  doi = {10.1000/a\\_b},\n"
        "  code = {https://example.org/a\\_b?c=d\\&e=\\%20},\n"
        "  eprint = {2005.00001},\n"
        "  archiveprefix = {arXiv},\n"
        "  primaryclass = {cs.LG},\n"
        "  url = {https://arxiv.org/abs/2005.00001},\n"
        "}\n\n"
    )


def test_a_card_without_its_authors_names_has_no_author_field():
    text = "".join(export.bibtex([paper(authors=(), authors_count=4, arxiv=None)]))
    assert "author" not in text and "eprint" not in text


@pytest.mark.parametrize("title", TITLES)
def test_what_was_written_reads_back(title):
    (entry,) = again(paper(title=title, authors=("Smith, Ltd", "Bell and Sons", "E. Müller")))
    assert entry.title == title
    assert entry.authors == ("Smith, Ltd", "Bell and Sons", "E. Müller")
    assert (entry.date, entry.arxiv) == ("2020-05-06", "2005.00001")
    assert (entry.doi, entry.code) == ("10.1000/a_b", "https://example.org/a_b?c=d&e=%20")


@given(st.text(alphabet=st.sampled_from("\\{}$%&#_^~-`'?!\"@,= \nabäλ"), min_size=1))
def test_any_text_reads_back_and_breaks_out_of_nothing(text):
    title = line(text)
    if title:
        entries = again(paper(title=title), paper(key="next", arxiv=None, title="Next"))
        assert [entry.title for entry in entries] == [title, "Next"]


@given(st.text(alphabet=st.sampled_from("\\{}$%&#_^~ab"), min_size=1))
def test_braces_are_balanced_as_bibtex_counts_them(text):
    depth = 0
    for character in export.latex(text):
        depth += (character == "{") - (character == "}")
        assert depth >= 0
    assert depth == 0


def test_only_commands_that_print_are_written():
    for title in TITLES:
        for command in re.findall(r"\\([A-Za-z]+)", export.latex(title)):
            assert command.startswith("text") or command in ("alpha", "mathcal")
        assert "^^" not in export.latex(title)


def test_a_formula_takes_no_time_to_reject():
    began = time.process_time()
    export.latex("$" + "a" * 20_000 + "\\input" + "$a\\" * 5_000)
    export.latex("$" + "\\alpha" * 2_000 + "\\")
    assert time.process_time() - began < 5


def table(*papers: Paper) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO("".join(export.csv(papers)), newline="")))


def test_a_table():
    (row,) = table(paper(title='A "title", with\nlines', wing="compute", held=1, measured=2))
    assert row == {
        "key": "smith2020", "title": 'A "title", with lines', "date": "2020-05-06",
        "authors": "Ann Smith; Jan van der Berg", "authors_count": "2", "arxiv": "2005.00001",
        "doi": "10.1000/a_b", "code": "https://example.org/a_b?c=d&e=%20",
        "categories": "cs.LG stat.ML", "wing": "compute", "status": "listed", "badge": "not-held",
        "claims_held": "1", "claims_measured": "2", "votes": "2", "comments": "1",
        "summary": "An abstract",
    }  # fmt: skip


@pytest.mark.parametrize(
    "begin", ["=", "+", "-", "@", " =", "\t=", "\n+", "＝", "|", "a;=", 'a;"-']
)
def test_no_cell_is_a_formula(begin):
    attack = f"{begin}cmd|' /C calc'!A0"
    (row,) = table(
        paper(title=attack, summary=attack, authors=(attack, attack), code=attack, key=attack)
    )
    for text in (row["title"], row["summary"], row["authors"], row["code"], row["key"]):
        for part in (text, *(t.strip("\" '") if "'" not in t[:4] else t for t in text.split(";"))):
            assert not part.lstrip(' "').startswith(("=", "+", "-", "@", "＝", "|"))


def test_an_ordinary_cell_is_left_alone():
    text = "A-B: 3 + 4 = 7; a@b (x; y)"
    assert export.cell(text) == text


def test_nothing_is_written_before_it_is_asked_for():
    def endless():
        while True:
            yield paper()

    pieces = export.bibtex(endless())
    assert next(pieces).startswith("@misc") and next(export.csv(endless())).startswith("key,")
