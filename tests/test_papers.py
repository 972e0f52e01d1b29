from __future__ import annotations

import datetime
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from toy_recipe import ROOT, SLUG, install

from pantarhei import cli, papers
from pantarhei.errors import RequestError
from pantarhei.papers import Card, card, catalogue, find, load_recipe
from pantarhei.runs import Recipe


def test_the_reading_list_is_whole():
    slugs = [one.slug for one in catalogue()]
    assert len(slugs) == len(set(slugs)) == 31
    assert slugs[0] == "rbqe" and slugs[7] == "sortednet" and slugs[-1] == "ad-progression"


@pytest.mark.parametrize("one", catalogue(), ids=lambda one: one.slug)
def test_a_card_states_its_facts(one: Card):
    assert one.title and one.wing in papers.WINGS and one.authors_count >= 2
    assert datetime.date(2013, 1, 1) < datetime.date.fromisoformat(one.date)
    assert one.arxiv is not None and re.fullmatch(r"\d{4}\.\d{4,5}", one.arxiv)
    assert one.code is None or re.fullmatch(r"https://github\.com/[\w-]+/[\w.-]+", one.code)
    assert 2 <= len(re.findall(r"[.?](?: |$)", one.summary)) <= 4
    assert one.to_json()["status"] in ("runs", "planned")


def test_the_catalogue_agrees_with_the_reading_list():
    listed = ROOT.parent / "shared" / "papers" / "README.md"
    if not listed.exists():
        pytest.skip("the reading list's own page is not on this machine")
    rows = re.findall(
        r"^\| ([a-z0-9-]+) \| (.+?)\*? \| (\w+ \d+, \d+) \| (\d+) \|", listed.read_text(), re.M
    )
    expected = [
        (slug, title, datetime.datetime.strptime(date, "%b %d, %Y").date().isoformat(), int(count))
        for slug, title, date, count in rows
    ]
    assert [(c.slug, c.title, c.date, c.authors_count) for c in catalogue()] == expected


def test_a_paper_runs_as_soon_as_its_module_exists(tmp_path, monkeypatch):
    assert card(SLUG).status == "planned"
    with pytest.raises(RequestError, match=f"'{SLUG}' is planned"):
        load_recipe(SLUG)
    install(tmp_path, monkeypatch)
    assert card(SLUG).status == "runs"
    recipe = load_recipe(SLUG)
    assert isinstance(recipe, Recipe)
    assert [spec.id for spec in recipe.claims] == ["grows", "small", "far"]
    with pytest.raises(RequestError, match=f"these run: .*{SLUG}"):
        load_recipe("adapt")


def test_a_dash_in_a_slug_is_an_underscore_in_its_module():
    assert card("rd-prune").module == "pantarhei.papers.rd_prune"


@pytest.mark.parametrize("one", catalogue(), ids=lambda one: one.slug)
def test_every_recipe_loads_without_torch(one: Card):
    if one.status == "planned":
        return
    program = (
        f"import sys; from pantarhei.papers import load_recipe; load_recipe({one.slug!r});"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("rbqe", "rbqe"),
        ("RBQE", "rbqe"),
        ("early exit image", "rbqe"),
        ("sortdnet", "sortednet"),
        ("llama", "soft"),
        ("Alzheimers", "ad-progression"),
        ("prunning weight layer", "rd-prune"),
        ("evolving graph", "evolvegcn"),
        ("rd-prune", "rd-prune"),
    ],
)
def test_a_search_puts_the_paper_first(query, first):
    assert find(query)[0].slug == first


def test_every_word_must_match_and_filters_apply():
    assert find() == catalogue()
    assert find("pruning zebra") == ()
    assert set(find("dynamics", wing="learning")) < set(find("dynamics"))
    assert {one.wing for one in find("network", wing="systems")} == {"systems"}


def test_a_match_in_the_title_comes_before_one_in_the_summary():
    slugs = [one.slug for one in find("pruning")]
    titled = ["rd-prune" in slugs[:2], "macpruning" in slugs[:2]]
    assert all(titled)


@pytest.mark.parametrize("options", [{"wing": "computer"}, {"status": "run"}])
def test_an_unknown_filter_names_the_nearest(options):
    with pytest.raises(RequestError, match=r"Did you mean '(compute|runs)'"):
        find(**options)


@pytest.mark.parametrize("paper", [c for c in papers.catalogue() if c.own], ids=lambda c: c.slug)
def test_the_command_for_ones_own_data_is_one_that_exists(paper):
    assert paper.status == "runs"
    program, *words = shlex.split(paper.own)
    if program == "python":
        assert (Path(__file__).parent.parent / words[0]).exists()
        return
    command = typer.main.get_command(cli.app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context("pantarhei", words)  # refuses unknown options and values of a wrong type


def test_every_paper_that_runs_says_what_to_do_with_ones_own_data():
    assert all(card.own for card in papers.catalogue() if card.status == "runs")
