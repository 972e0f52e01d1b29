"""A recipe for tests: counts slowly, keeps its place, and stands in for a planned paper."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SLUG = "staged"  # planned in the catalogue, so that no real recipe is hidden
SOURCE = """
import json, time
from pantarhei.claims import ClaimSpec
from pantarhei.errors import RequestError
from pantarhei.files import read_json, write_json

CLAIMS = (
    ClaimSpec("grows", "the value grows", "value", ">=", 1.0, paper_value="2 in Table 1"),
    ClaimSpec("small", "the value stays small", "value", "<=", {"quick": 10.0, "cpu": -1.0}),
    ClaimSpec("far", "only at a large scale", "value", ">=", {"gpu": 5.0}, paper_value=7.5),
)
SETTINGS = {
    scale: {"steps": steps, "pause": 0.0, "rate": 0.5, "mode": "plain", "on": True,
            "widths": (0.25, 1.0)}
    for scale, steps in (("quick", 4), ("cpu", 6), ("gpu", 8))
}

def recipe(run):
    if run.settings.mode == "bug":
        raise KeyError("a defect")
    if run.settings.mode == "refuse":
        raise RequestError("This cannot be served: do something else.")
    if run.settings.mode == "interrupt":
        raise KeyboardInterrupt
    place = run.checkpoint("place.json")
    state = read_json(place) if place.exists() else {"step": 0, "value": run.seed, "began": 0}
    state["began"] += 1
    with run.progress(run.settings.steps, "counting", start=state["step"]) as bar:
        while state["step"] < run.settings.steps:
            state["step"] += 1
            state["value"] = (state["value"] * 1103515245 + 12345) % 2**31
            write_json(place, state)
            time.sleep(run.settings.pause)
            bar.advance()
    value = 1 + state["value"] / 2**31
    run.metrics("values.csv", [{"step": state["step"], "value": value}])
    yield run.claim("grows", value, evidence="values.csv")
    if run.settings.mode != "forget":
        yield run.claim("small", float("nan") if run.settings.mode == "nan" else value)
    yield run.claim("far", value)
"""


def install(folder: Path, monkeypatch) -> None:
    """Make the toy recipe the recipe of SLUG in this process."""
    from pantarhei import papers

    (folder / f"{SLUG}.py").write_text(SOURCE)
    monkeypatch.setattr(papers, "__path__", [str(folder), *papers.__path__])
    monkeypatch.setitem(sys.modules, f"pantarhei.papers.{SLUG}", None)
    del sys.modules[f"pantarhei.papers.{SLUG}"]  # imported again here, forgotten after the test
    importlib.invalidate_caches()


def command(folder: Path, *arguments: str) -> list[str]:
    """Return the command of a new process in which the toy recipe is the recipe of SLUG."""
    (folder / f"{SLUG}.py").write_text(SOURCE)
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r});"
        "import pantarhei.papers as p; p.__path__.insert(0, sys.argv.pop(1));"
        "from pantarhei.cli import main; sys.exit(main())"
    )
    return [sys.executable, "-c", program, str(folder), *arguments]
