from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pantarhei.errors import RequestError
from pantarhei.feed.sources import bibtex

GOOD = r"""
% a comment, as people leave them
@string{nips = "NeurIPS"}
@preamble{"\newcommand{\x}{y}"}
@inproceedings{DBLP:conf/nips/Muller20,
  author    = {M{\"u}ller, Karl and van der Berg, Jan and {OpenAI Team} and others},
  title     = {{Dynamic} {R}outing at 50\% of the cost,
               with $\alpha$-nets},
  booktitle = nips,
  year      = 2020,
  month     = dec,
  doi       = {https://doi.org/10.1000/ABC},
  abstract  = {It takes 50% less & is R\&D.}
}
@article{old, Author = "Emmy Noether", TITLE = "Invarianten", year = {1918},
  eprint={math.GT/0309136},
  archivePrefix={arXiv}, primaryClass={math.GT}}
@misc{lex, editor={Knuth, Donald E.}, title={A title}, date={2021-03-04/2021-05-06}}
"""


def one(fields: str):
    return bibtex.read(f"@misc{{k, {fields}}}", "x.bib")[0]


BASE = "author={A B}, title={T}, year=2020"


def test_entries_are_read_and_their_latex_decoded():
    first, old, last = bibtex.read(GOOD, "x.bib")
    assert first.key == "DBLP-conf-nips-Muller20"
    assert first.title == "Dynamic Routing at 50% of the cost, with $\\alpha$-nets"
    assert first.authors == ("Karl Müller", "Jan van der Berg", "OpenAI Team")
    assert first.date == "2020-12-01" and first.doi == "10.1000/abc"
    assert first.summary == "It takes 50% less & is R&D."
    assert (old.key, old.arxiv, old.categories) == ("math-0309136", "math/0309136", "math.GT")
    assert (last.date, last.authors) == ("2021-03-04", ("Donald E. Knuth",))
    row = first.row()
    assert row["wing"] is None and row["status"] == "listed" and row["source"] == "bibtex"
    assert row["authors_count"] == 3 and row["arxiv"] is None


@pytest.mark.parametrize(
    ("latex", "plain"),
    [
        (r"Erd{\H o}s", "Erdős"),
        (
            r"{\L}ukasz {\O}rsted {\ss} \v{S} {\c{c}} \'{\i} \^o \~n \r{a}",
            "Łukasz Ørsted ß Š ç í ô ñ å",
        ),
        (r"x~y -- z", "x y – z"),
        (r"\emph{x} \textbf{\textit{y}}", "x y"),
        (r"\href{http://a.b}{link} \url{http://a.b/c_d}", "link http://a.b/c_d"),
        (r"\input{/etc/passwd}", ""),
        (r"$x_{1}^2$ \(y\)", r"$x_{1}^2$ \(y\)"),
        ("100% sure", "100% sure"),
        (r"\textbraceleft{}\textbraceright{}", "{}"),
    ],
)
def test_latex(latex, plain):
    assert bibtex.decode(latex).strip() == plain


@given(st.text(alphabet=st.sampled_from("ab %&#_^'`-?!<>\"@,.=()[]*/:;|+é"), max_size=30))
def test_text_without_latex_needs_no_decoder(text):
    assume(not bibtex._LATEX.search(text))
    literal = re.sub(r"([%&])", r"\\\1", text)
    assert bibtex.decode(text) == bibtex._decoder().latex_to_text(literal)


@pytest.mark.parametrize(
    ("fields", "date"),
    [
        ("year=2020", "2020-01-01"),
        ("year={2020}, month=feb", "2020-02-01"),
        ("year={2020}, month={February}, day={3}", "2020-02-03"),
        ("year={2020}, month={11}", "2020-11-01"),
        ('year=2020, month = "12~" # jan', "2020-12-01"),
        ("year=2020, month={someday}", "2020-01-01"),
        ("date={2020-02}", "2020-02-01"),
    ],
)
def test_dates(fields, date):
    assert one(f"author={{A B}}, title={{T}}, {fields}").date == date


@pytest.mark.parametrize(
    "field",
    [
        "eprint={2006.16581v2}",
        "eprint={arXiv:2006.16581}, archivePrefix={arXiv}",
        "journal={arXiv preprint arXiv:2006.16581}",
        "journal={CoRR}, volume={abs/2006.16581}",
        "url={https://arxiv.org/abs/2006.16581v1}",
    ],
)
def test_an_arxiv_identifier_is_found(field):
    assert one(f"{BASE}, {field}").arxiv == "2006.16581"


def test_another_archives_identifier_is_not_arxivs():
    assert one(f"{BASE}, eprint={{12345}}, eprinttype={{pubmed}}").arxiv is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("@misc{smith, year=2020}", "Entry 'smith' in 'x.bib' has no title and no author."),
        ("@misc{s, title={ }, author={A}, year=2020}", "Entry 's' in 'x.bib' has no title."),
        ("@misc{s, title={T}, author={A}, year={soon}}", "has the year 'soon', which is not like"),
        ("@misc{s, title={T}, author={A}, year={9999}}", "has a date in the year 9999"),
        ("@misc{s, title={T}, author={others}, year=2020}", "has no authors"),
        ("@misc{s, title={T}, author={A}, date={2020-13-01}}", "has the date '2020-13-01'"),
        ("@misc{s, title={T} # {U}, author={A}, year=2020}", "puts its title together with '#'"),
        ("@misc{s, title={T}, title={U}, author={A}, year=2020}", "has the field title twice"),
        (f"@misc{{s, {BASE}, eprint={{nonsense}}}}", "'nonsense', which is no arXiv identifier"),
        (f"@misc{{s, {BASE}, doi={{11.1/x}}}}", "has '11.1/x', which is no DOI"),
        (f"@misc{{s, {BASE}, code={{javascript:alert(1)}}}}", "which is no http or https address"),
        (f"@misc{{s, {BASE}}}\n@misc{{s, author={{C}}, title={{U}}, year=2020}}", "two different"),
        (f"@misc{{s, {BASE}\n\n@misc{{t, {BASE}}}", "not readable as BibTeX from line 1 on"),
        ("nothing here", "'x.bib' holds no BibTeX entries."),
        ("", "'x.bib' holds no BibTeX entries."),
        ("@misc{s, title={%s}, author={A}, year=2020}" % ("x" * 1001), "a title of more than 1000"),
        (f"@misc{{..., {BASE.replace('{T}', '{...}')}}}", "has no key that could stand"),
    ],
)  # fmt: skip
def test_a_bad_entry_is_named_in_one_sentence(text, sentence):
    with pytest.raises(RequestError) as caught:
        bibtex.read(text, "x.bib")
    assert sentence in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_the_same_entry_twice_is_one():
    assert len(bibtex.read(f"@misc{{s, {BASE}}}\n@misc{{s, {BASE}}}", "x.bib")) == 1


@pytest.mark.parametrize(
    "title",
    ["{" * 3000 + "}" * 3000, r"\textbf{" * 3000 + "}" * 3000, r"\footnote", "x" * 70_000],
)
def test_latex_that_cannot_be_read_is_refused_or_harmless(title):
    try:
        (entry,) = bibtex.read(f"@misc{{s, title={{a{title}}}, author={{A}}, year=2020}}", "x.bib")
    except RequestError as error:
        assert "Entry 's'" in str(error)
    else:
        assert entry.title.strip("{}") == "a"


@pytest.mark.parametrize(
    "text",
    ["@article{" * 2000, "@misc{a,\n" * 2000, "@" * 5000, '"' * 5000, "@misc{a, b=" + "{" * 5000],
)
def test_a_heap_of_openings_is_refused(text):
    with pytest.raises(RequestError):
        bibtex.read(text, "x.bib")


def test_what_an_entry_says_cannot_reorder_or_hide_text():
    entry = one("author={A\u202eB}, title={a\x00b\u2066c\u200fd}, year=2020")
    assert entry.title == "abcd" and entry.authors == ("AB",)
