"""The checkpoint benchmark at toy size: every contestant saves, and the table shows what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.checkpoint import ASYNC, OURS, SYNC, summarise, table
from tests.support import ROOT, environment


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--quick", f"--folder={tmp_path}", f"--out={out}"]
    threads = environment() | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=threads, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert {name: len(rows) for name, rows in results["saves"].items()} == {OURS: 2, SYNC: 2, ASYNC: 2}
    assert all(row["stall"] <= row["whole"] for rows in results["saves"].values() for row in rows)
    assert done.stdout.strip().endswith(table(results)) and results["torch"] and results["commit"]
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_ratios_are_formed_within_a_round() -> None:
    ours = [{"stall": 1.0, "whole": 3.0}, {"stall": 2.0, "whole": 4.0}, {"stall": 4.0, "whole": 8.0}]
    sync = [{"stall": stall, "whole": stall} for stall in (8.0, 8.0, 8.0)]
    found = summarise({OURS: ours, SYNC: sync, ASYNC: ours})
    assert found["times_our_stall"] == {SYNC: [4.0, 2.0, 8.0], ASYNC: [1.0, 1.0, 1.0]}
    assert found["figures"][OURS]["stall"] == [2.0, 1.0, 4.0]
