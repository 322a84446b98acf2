"""What becomes of an array that Slurm does not take, or gives no answer on; tests/slurm/test_sweep.py has real ones."""

from pathlib import Path

import pytest

from launch import journal
from tests.launch.conftest import Submit
from tests.launch.test_sweep import answers

SBATCH = """#!/bin/sh
case "$*" in
*--test-only*|*--version*) exit 0 ;;
esac
echo '{said}'
echo 'sbatch: error: {said}' >&2
exit {code}
"""


@pytest.mark.parametrize(
    ("said", "code", "is_open"),
    [
        ("Batch job submission failed: Invalid account", 1, False),
        ("Batch job submission failed: Socket timed out on send/recv operation", 1, True),
        ("words of this site, without a number", 0, True),
    ],
)
def test_an_array_that_may_be_in_the_queue_is_not_forgotten(
    submit: Submit, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    said: str, code: int, is_open: bool,
) -> None:  # fmt: skip
    runs, swept = tmp_path / "runs", ("seed=1,2", "cluster=slurm", "cluster.gpu_flag=null")
    answers(tmp_path / "bin", monkeypatch, scontrol="", sinfo="", squeue="", srun="", sbatch="")
    (tmp_path / "bin" / "sbatch").write_text(SBATCH.format(said=said, code=code))
    assert submit(*swept) == 1
    told = capsys.readouterr().err
    assert said in told and (journal.WAIT in told) == is_open
    assert len([*(runs / journal.FOLDER).glob("*.intent")]) == is_open
    sweeps, folders = [*runs.glob("*/.sweep-*")], [path.parent for path in runs.glob("*/[!.]*/config.yaml")]
    assert len(folders) == 2 and len(sweeps) == is_open and not [*runs.glob("*/*/slurm/job")]
    # Again at once: nothing is queued twice as long as the first may be there.
    (tmp_path / "bin" / "sbatch").write_text(SBATCH.format(said="42", code=0))
    assert submit(*swept) == is_open
    shown = capsys.readouterr()
    if is_open:
        assert "was just cut short" in shown.err and not [*runs.glob("*/*/slurm/job")]
        waits = "\n".join(f"43_{n} |0 |PENDING |Priority | |N/A |{sweeps[0]}/%a/slurm/%A_%a.out " for n in (0, 1))
        answers(tmp_path / "bin", monkeypatch, squeue=waits)
        assert submit(*swept) == 0 and capsys.readouterr().out.count("already, PENDING") == 2
    assert {(run / "slurm" / "job").read_text() for run in folders} == {f"{43 if is_open else 42}_{n}" for n in (0, 1)}
