"""Words, queries, snippets and the embedding model, each by itself."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantarhei.feed.search import meaning, snippets, text
from pantarhei.feed.search.words import Vocabulary, split, stems
from pantarhei.papers import catalogue

KNOWN = Vocabulary({"neural": 40, "network": 50, "representation": 7, "rbqe": 1, "form": 9,
                    "from": 90}, 100, {"neural", "network", "represent", "prune"})  # fmt: skip


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("netwrok", "network"),  # exchanged
        ("netork", "network"),  # missing
        ("networrk", "network"),  # too many
        ("metwork", "network"),  # wrong
        ("reprsentatoin", "representation"),  # two slips in a long word
        ("nework", "network"),
        ("frm", None),  # too short to tell
        ("frmo", "from"),  # as near to "form": the more frequent
        ("nutwerk", None),  # two slips in a short word
        ("x9z8", None),
        ("q" * 10_000, None),
    ],
)
def test_slips_are_forgiven(typed, meant):
    assert KNOWN.correct(typed) == meant


def test_the_corrected_query_is_said_and_known_words_stay():
    query, said = text.corrected(text.parse('Neural netwrok rbqe pruning "netwrok x"'), KNOWN)
    assert query.words == ("neural", "network", "rbqe", "pruning")
    assert said == 'neural network rbqe pruning "network x"'
    assert text.corrected(text.parse("neural network"), KNOWN) == (
        text.parse("neural network"),
        None,
    )


def test_a_query_is_words_and_phrases_and_nothing_else():
    found = text.parse('deep AND ("early exit" OR title:nets*)')
    assert found.phrases == ("early exit",)
    assert found.words == ("deep", "title", "nets")
    assert text.parse('an unclosed "quote here').phrases == ()
    assert text.parse("„early exit“").phrases == ("early exit",)
    assert text.parse("the of and").words == ("the", "of", "and")
    assert len(text.parse(" ".join(f"w{i}" for i in range(500))).words) == 16


@given(st.text(max_size=80))
def test_any_text_is_a_query(query):
    parsed = text.parse(query)
    for word in parsed.words:
        assert word and word.isalnum() and split(word) == [word]


def test_stems_are_sqlites_and_snippets_follow_them():
    assert stems(["networks", "policies", "running", "2006"]) == [
        "network", "polici", "run", "2006"
    ]  # fmt: skip
    found = snippets.cut("A policy runs. Netherlands.", snippets.roots(["policies", "net"]))
    assert [part for part, marked in found if marked] == ["policy"]


@given(st.text("ab_ é.", max_size=60), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_words_are_marked_where_a_pattern_of_all_finds_them(body, words):
    pattern = re.compile(rf"\b(?:{'|'.join(words)})\w{{0,5}}\b") if words else None
    expected = [one.span() for one in pattern.finditer(body)] if pattern else []
    found = snippets.cut(body, tuple(dict.fromkeys(words)))
    assert found.text == body
    assert list(found.marks) == expected[:16]


def test_a_snippet_is_the_text_around_the_words():
    filler = "Nothing of note stands here. " * 30
    whole = filler + "Then networks stop early, as <b>networks</b> do. " + filler
    found = snippets.cut(whole, snippets.roots(["network", "early"]))
    assert len(str(found)) < 305
    assert "Then networks stop early" in str(found)
    assert "".join(part for part, _ in found) == str(found)
    assert found.text.strip("… ") in whole
    marked = [part for part, is_marked in found if is_marked]
    assert marked[:3] == ["networks", "early", "networks"]
    assert "<b>" not in found.__html__() and "<mark>early</mark>" in found.__html__()


@given(st.text(max_size=600), st.lists(st.text("abİß é'\"<&", min_size=1, max_size=4), max_size=3))
def test_snippets_of_anything_are_whole(body, words):
    found = snippets.cut(body, snippets.roots([w for word in words for w in split(word)]))
    assert "".join(part for part, _ in found) == found.text
    assert found.text.removeprefix("… ").removesuffix(" …") in body
    html = found.__html__().replace("<mark>", "").replace("</mark>", "")
    assert "<" not in html and '"' not in html


def test_the_model_is_the_library_s_own():
    wordllama = pytest.importorskip("wordllama")
    model = meaning.load()
    assert model is meaning.load()
    texts = [meaning.text_of(card.title, card.summary) for card in catalogue()]
    theirs = wordllama.WordLlama.load(
        cache_dir=Path(wordllama.__file__).parent, disable_download=True
    ).embed(texts, norm=True)
    np.testing.assert_allclose(model.embed(texts), theirs, atol=1e-6)
    for number in (0, 7):  # alone as among others
        np.testing.assert_allclose(model.embed(texts[number : number + 1])[0], theirs[number],
                                   atol=1e-6)  # fmt: skip
    assert model.embed(["", "  "]).tolist() == np.zeros((2, 256)).tolist()
    assert model.embed([]).shape == (0, 256)
    packed = meaning.unpack([meaning.pack(v) for v in theirs], 256)
    np.testing.assert_allclose(packed, theirs, atol=1e-3)
    assert meaning.digest("a", "b") != meaning.digest("a", "c")


def test_memory_of_words_does_not_change_what_is_found(monkeypatch):
    model = meaning.load()
    if model is None:
        pytest.skip("wordllama is not installed")
    texts = [card.summary for card in catalogue()]
    before = model.embed(texts)
    monkeypatch.setattr(meaning, "_REMEMBERED", 10)  # forgotten at every call
    np.testing.assert_allclose(
        np.concatenate([model.embed(texts[:9]), model.embed(texts[9:])]), before, atol=1e-6
    )
