"""A chain of jobs, each of which queues the one that follows it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import attempts, chain, render, requeue
from tests.launch.test_attempts import leave_verdict
from tests.launch.test_requeue import WORDS


def test_a_chain_ends_with_a_job_that_could_not_begin(tools: Callable[..., Path], ended: Any) -> None:
    """Its successor could not either."""
    folder, _ = ended("drain", "cluster.requeue=chain")
    attempts.amend(folder, 1, job="1.0")
    attempts.refuse(folder, "2.0", "nodes: the allocation has 1")
    asked = tools(sbatch="3", scancel="")
    assert (chain.queue(folder), requeue.main(folder)) == (0, 2)
    assert asked.read_text().splitlines()[-1] == "scancel 3"


def test_a_job_of_a_chain_accounts_for_the_one_before_that_was_lost(
    tools: Callable[..., Path], ended: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = ended("drain", "cluster.requeue=chain")
    tools(scontrol=WORDS["as it runs"], sbatch="3", sinfo="node1 idle\nnode2 down*")
    assert (chain.queue(folder), requeue.main(folder)) == (0, 0)
    for job in ("3", "4"):  # each with its node
        monkeypatch.setenv("SLURM_JOB_ID", job)
        tools(sbatch=str(int(job) + 1))
        assert chain.queue(folder) == 0
        attempts.begin(folder, [], job=f"{job}.0", nodes=["node1", "node2"])
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    tools(sbatch="6")
    assert chain.queue(folder) == 0
    with pytest.raises(RuntimeError, match="no_progress: 3 attempts"):
        attempts.begin(folder, [], job="5.0")
    _, second, third = attempts.records(folder)
    assert second["cause"] == third["cause"] == "node_failure" and second["bad_nodes"] == ["node2"]
    assert second["next"]["decision"] == "requeue"
    # One that somebody submits is none of the chain.
    attempts.begin(folder, [], job="9.0")
    monkeypatch.setenv("SLURM_JOB_ID", "10")
    tools(sbatch="11")
    assert chain.queue(folder) == 0
    attempts.begin(folder, [], job="10.0")
    assert attempts.records(folder)[-2]["cause"] == "killed"


def test_a_chain_queues_one_successor_and_takes_it_back_at_the_end(tools: Callable[..., Path], ended: Any) -> None:
    folder, config = ended("stop", "cluster.requeue=chain")
    asked = tools(scontrol=WORDS["as it runs"], sbatch="3", scancel="")
    assert chain.queue(folder) == 0
    line = asked.read_text().splitlines()[-1]
    assert line.startswith("sbatch --parsable --dependency=afterany:2 ") and line.endswith(f"train.sbatch {folder}")
    assert "--no-requeue" in line and "--requeue" not in line.split()
    assert requeue.main(folder) == 0 and asked.read_text().splitlines()[-1] == "scancel 3"
    assert "--no-requeue" in render.batch_script(config, folder)


def test_a_successor_waits_for_nothing_that_the_first_job_has_waited_for(
    tools: Callable[..., Path], ended: Any
) -> None:
    """Of two --dependency Slurm would take the last one."""
    folder, _ = ended("drain", "cluster.requeue=chain", "+cluster.sbatch.dependency='afterok:5'")
    asked = tools(sbatch="3")
    assert chain.queue(folder) == 0
    assert [w for w in asked.read_text().split() if w.startswith("--dependency")] == ["--dependency=afterany:2"]


def test_a_successor_has_the_notice_of_its_own_submission(tools: Callable[..., Path], ended: Any) -> None:
    folder, _ = ended("drain", "cluster.requeue=chain")
    (folder / "control" / "heartbeat.json").write_text('{"save_seconds": 400}')
    asked = tools(sbatch="3")
    assert chain.queue(folder) == 0 and "--signal=USR2@920" in asked.read_text()
    assert f"export {render.NOTICE}=920" in (folder / "slurm" / "job.sh").read_text()


def test_a_chain_that_could_not_queue_its_successor_says_so_at_the_end(
    tools: Callable[..., Path], ended: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = ended("drain", "cluster.requeue=chain")
    tools(scontrol=WORDS["as it runs"])
    assert chain.queue(folder) == 0 and "sbatch is not on PATH" in capsys.readouterr().err
    assert requeue.main(folder) == 1
    assert "no successor was queued" in attempts.newest_record(folder)["next"]["reason"]


def test_a_successor_ends_at_once_where_nothing_is_left(
    tools: Callable[..., Path], ended: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = ended("drain", "cluster.requeue=chain")
    asked = tools(scontrol=WORDS["as it runs"], sbatch="3", scancel="")
    assert (chain.queue(folder), requeue.main(folder)) == (0, 0)
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    assert chain.queue(folder) == 0 and (folder / "slurm" / "job").read_text() == "3"
    leave_verdict(folder, status="done", cause="finished", step=9, attempt=1, message="")
    before = asked.read_text()
    assert chain.queue(folder) == render.NOTHING_LEFT and asked.read_text() == before


def test_in_a_chain_it_is_the_successor_that_is_told(tools: Callable[..., Path], ended: Any) -> None:
    folder, _ = ended("drain", "cluster.requeue=chain")
    asked = tools(scontrol=WORDS["as it runs"], sbatch="3", scancel="")
    attempts.amend(folder, 1, cause="preflight", bad_nodes=["node2"])
    assert chain.queue(folder) == 0 and requeue.main(folder) == 0
    assert asked.read_text().splitlines()[-1] == "scontrol update JobId=3 ExcNodeList=node2"


def refuse_to_answer(folder: Path) -> None:
    """sbatch as its caller sees it where the controller's answer is lost."""
    (folder / "sbatch").write_text("#!/bin/bash\necho sbatch: error: Socket timed out >&2\nexit 1\n")
    (folder / "sbatch").chmod(0o755)


def line(job: str, state: str, folder: Path) -> str:
    return f"{job}|0|{state}|Dependency||N/A|{folder / 'slurm' / job}.out"


@pytest.mark.parametrize(("cause", "then"), [("stop", "scancel 3"), ("drain", "")])
def test_a_successor_whose_sbatch_did_not_answer_is_found_in_the_queue(
    tools: Callable[..., Path], ended: Any, tmp_path: Path, cause: str, then: str
) -> None:
    """It is the job that waits for this one: not the one before it, nor one of another run, nor what a person has
    submitted. Where it came late, it is found at the end, to be taken back or left in peace.
    """
    folder, _ = ended(cause, "cluster.requeue=chain")
    listed = [line("1", "COMPLETING", folder), line("2", "RUNNING", folder), line("9", "PENDING", tmp_path / "other")]
    listed.append(line("8", "PENDING", folder))
    asked = tools(scontrol=WORDS["as it runs"], scancel="", squeue="\n".join(listed))
    with (tmp_path / "bin" / "scontrol").open("a") as tool:
        tool.write('[[ $4 == 3 ]] && echo "Dependency=afterany:2(unfulfilled)" || echo "Dependency=afterany:22(x)"\n')
    refuse_to_answer(tmp_path / "bin")
    assert chain.queue(folder) == 0 and chain.waiting(folder, "2.0") is None
    tools(squeue="\n".join([*listed, line("3", "PENDING", folder)]))
    assert requeue.main(folder) == 0
    orders = [line for line in asked.read_text().splitlines() if line.startswith("scancel")]
    assert orders == [then] * bool(then)
    assert attempts.newest_record(folder)["next"]["decision"] == ("end" if then else "requeue")
    assert chain.queue(folder) == 0 and chain.waiting(folder, "2.0") == "3"


def test_a_successor_that_nobody_knows_of_ends_at_once_where_the_run_has_ended(
    tools: Callable[..., Path], ended: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What somebody submits begins with a record that says `end`, too, and trains."""
    folder, _ = ended("config", "cluster.requeue=chain")
    tools(scontrol=WORDS["as it runs"])
    (tmp_path / "bin" / "sbatch").write_text(f'#!/bin/bash\necho -n "${chain.FOLLOWS}" >{tmp_path}/follows\necho 4\n')
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    assert chain.queue(folder) == 0 and (tmp_path / "follows").read_text() == "2"
    (folder / "control" / "successor.json").unlink()  # the node died before it was written
    assert requeue.main(folder) == 1
    monkeypatch.setenv("SLURM_JOB_ID", "4")
    monkeypatch.setenv(chain.FOLLOWS, "2")
    assert chain.queue(folder) == render.NOTHING_LEFT and not (folder / "control" / "successor.json").exists()
    monkeypatch.delenv(chain.FOLLOWS)
    assert chain.queue(folder) == 0


def test_a_successor_that_nobody_knew_of_accounts_for_the_job_that_queued_it(
    tools: Callable[..., Path], ended: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = ended("drain", "cluster.requeue=chain")
    attempts.begin(folder, [], job="3.0", nodes=["node1"])  # lost with its node, and with the id of its successor
    tools(sbatch="5", sinfo="node1 down*")
    monkeypatch.setenv("SLURM_JOB_ID", "4")
    monkeypatch.setenv(chain.FOLLOWS, "3")
    assert chain.queue(folder) == 0
    attempts.begin(folder, [], job="4.0", nodes=["node2"])
    lost = attempts.records(folder)[-2]
    assert (lost["cause"], lost["bad_nodes"], lost["next"]["decision"]) == ("node_failure", ["node1"], "requeue")
