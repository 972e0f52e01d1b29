from __future__ import annotations

import json

import pytest

from pantarhei.errors import RequestError
from pantarhei.feed.sources import records

GOOD = {"key": "a", "title": "T", "authors": ["A B"], "date": "2026-01-31"}


def read(value):
    return records.read(value if isinstance(value, str) else json.dumps(value), "x.json")


def test_papers_are_read():
    first, second = read(
        [
            {**GOOD, "summary": "One\n\ntwo", "doi": None, "code": "https://example.org/x"},
            {
                "title": "U",
                "authors": ["C", "D"],
                "date": "2020",
                "arxiv": "math.GT/0309136v1",
                "categories": ["math.GT", "nonsense!"],
            },
        ]
    )
    assert (first.key, first.summary, first.code) == ("a", "One\n\ntwo", "https://example.org/x")
    assert (second.key, second.arxiv, second.categories) == (
        "math-0309136",
        "math/0309136",
        "math.GT",
    )
    assert first.row()["status"] == "listed" and first.row()["source"] == "json"


def test_one_object_is_one_paper():
    assert len(read(GOOD)) == 1


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("", "not readable JSON"),
        ("[" * 100_000, "not readable JSON"),
        ("[1", "not readable JSON"),
        ('{"title": ' + "9" * 5000 + "}", "not readable JSON"),
        ("[]", "holds no papers"),
        ("3", "holds no papers"),
        ([3], "Paper 1 in 'x.json' is not an object"),
        ([GOOD, {"key": "b"}], "Paper 2 in 'x.json' ('b') has no title and no authors and no date"),
        ({**GOOD, "key": ""}, "has no key"),
        ({**GOOD, "titel": "x"}, "unknown field 'titel'. Did you mean 'title'?"),
        ({**GOOD, "title": 3}, "'title' is text"),
        ({**GOOD, "authors": "A B"}, "'authors' is a list of texts"),
        ({**GOOD, "authors": [None]}, "'authors' is a list of texts"),
        ({**GOOD, "authors": ["\u0000 "]}, "has no authors"),
        ({**GOOD, "date": "31.1.2026"}, "which is not like 2026-01-31"),
        ({**GOOD, "date": "2026-02-30"}, "which is not like 2026-01-31"),
        ({**GOOD, "date": "1700-01-01"}, "has a date in the year 1700"),
        ({**GOOD, "arxiv": "2013.00001"}, "no arXiv identifier"),
        ({**GOOD, "code": "javascript:alert(1)"}, "no http or https address"),
        ({**GOOD, "code": "https://a b"}, "no http or https address"),
        ({**GOOD, "code": "https://[x"}, "no http or https address"),
        ({**GOOD, "summary": "x" * 20_001}, "an abstract of over 20000"),
        ({**GOOD, "authors": ["x"] * 10_001}, "more than 10000 authors"),
    ],
)
def test_a_bad_paper_is_named_in_one_sentence(value, sentence):
    with pytest.raises(RequestError) as caught:
        read(value)
    assert sentence in str(caught.value)


def test_a_surrogate_that_json_can_spell_never_reaches_a_store():
    entry = read('{"key":"a","title":"T\\ud800x\\u0000","authors":["A"],"date":"2026"}')[0]
    assert entry.title == "Tx"
    entry.title.encode()
