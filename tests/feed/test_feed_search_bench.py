"""The benchmark runs, small."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "feed.py"


@pytest.mark.parametrize("mode", ["--direct", "--http"])
def test_the_benchmark_runs(tmp_path, mode):
    if mode == "--http":
        pytest.importorskip("uvicorn")
        pytest.importorskip("pantarhei.feed.web.app")
    command = [sys.executable, str(BENCHMARK), "--papers", "300", "--queries", "40", "--scans", "5"]
    command += ["--readers", "2", "--store", str(tmp_path / "feed.sqlite"), mode]
    for again in (False, True):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert ("ingest: 300 papers" in done.stdout) != again
        assert re.search(r"the scan's p95 is [\d.]+ times ours", done.stdout)
        assert re.search(r"memory.* \d+ MB", done.stdout)
