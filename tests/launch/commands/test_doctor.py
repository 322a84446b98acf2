"""What `synthos doctor` and `synthos explain` say of a cluster, from its settings."""

from dataclasses import replace

import pytest

from launch.commands.doctor import propose, render
from launch.outlook import endings
from launch.site import Partition, Site

BATCH = Partition("batch", True, True, None, 30, "REQUEUE", 1, 4, 16, 64000, 2, "h200")
URGENT = replace(BATCH, name="urgent", default=False, tier=2, preempt_mode="OFF")
SITE = Site({"KillWait": "30 sec", "PreemptType": "preempt/partition_prio"}, [BATCH, URGENT])


@pytest.mark.parametrize(
    ("requeue", "words"),
    [
        ("scontrol", "Slurm starts the job again"),
        ("chain", "the next job of the chain goes on"),
        ("none", "the run ends, since cluster.requeue is none"),
    ],
)  # fmt: skip
def test_what_follows_an_end_is_what_was_asked_for(requeue: str, words: str) -> None:
    """A job without --requeue is cancelled where Slurm would requeue it, and ends with its node."""
    found = {ending.cause: ending.then for ending in endings(SITE, BATCH, 300, requeue)}
    assert found == {"time limit": words, "cancel": "Slurm ends the job", "preemption": words, "node failure": words}


def test_a_partition_that_cancels_what_it_preempts() -> None:
    batch = replace(BATCH, preempt_mode="CANCEL")
    (found,) = [e.then for e in endings(replace(SITE, partitions=[batch, URGENT]), batch, 300, "scontrol")
                if e.cause == "preemption"]  # fmt: skip
    assert found == "the job is preempted (CANCEL)"


@pytest.mark.parametrize(
    ("limit", "notice"), [(None, None), ("2-00:00:00", None), ("00:20:00", None), ("00:10:00", 150), ("00:00:03", 1)]
)
def test_a_proposed_page_goes_by_the_measured_time_of_a_save(limit: str | None, notice: int | None) -> None:
    """But where jobs are so short that the usual notice is a good part of them."""
    page = propose(SITE, replace(BATCH, limit=limit), "mine")
    assert page.notice_seconds == notice
    assert f"notice_seconds: {'null' if notice is None else notice}\n" in render(SITE, page)
