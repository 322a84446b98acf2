"""What a cluster does to a run, done to one on the practice Slurm (slurm/practice.sh) by Slurm's own commands.

A fault returns as soon as nothing keeps the run from starting again; the two minutes that Slurm lets pass after a
requeue are spared. For `benchmarks.chaos` and the tests.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.learning import ROOT
from launch import attempts
from launch.agent import parents
from synthos.train.checkpoint_files import STEP


class Victim:
    """A run on a practice cluster.

    Args:
        folder: of the run.
        job: Slurm's id of its job.
        practice: folder of the cluster.
        environment: of a shell that is pointed at it.
    """

    def __init__(self, folder: Path, job: str, practice: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.job, self.practice, self.environment = folder, job, practice, dict(environment)

    def run(self, *command: str | Path) -> str:
        """What a command prints that has to succeed."""
        done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(f"{command} exits with {done.returncode}: {done.stderr}")
        return done.stdout

    def state(self) -> str:
        match = re.search(r"JobState=(\w+)", self.run("scontrol", "show", "job", self.job))
        return match[1] if match else ""

    def records(self) -> list[dict[str, Any]]:
        return attempts.records(self.folder)

    def losses(self) -> list[tuple[int, float]]:
        """Step and loss of all that counts."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last is perhaps being written
        return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]

    def nodes(self) -> list[str]:
        return list(self.records()[-1]["nodes"])

    def processes(self, module: str) -> list[int]:
        """The processes that run a module for the run, but torchrun and srun that only start them."""
        found = []
        for pid, _ in parents():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            except FileNotFoundError:  # it has just ended
                continue
            starts = any(word in ("torch.distributed.run", "srun") for word in words)
            if module in words and not starts and any(str(self.folder) in word for word in words):
                found.append(pid)
        return sorted(found)

    def processes_on(self, node: str) -> list[int]:
        """The processes of the run's job on a node, with the daemons that look after its steps there.

        Two clusters on this machine count their jobs and name their nodes alike.
        """
        named = {"SLURM_JOB_ID": self.job, "SLURMD_NODENAME": node, "SLURM_CONF": self.practice / "slurm.conf"}
        sought = {f"{name}={value}".encode() for name, value in named.items()}
        family = dict(parents())
        found = set()
        for pid in family:
            with suppress(OSError):  # it has just ended
                if sought <= {*Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")}:
                    found |= {pid, family[pid]} if _is_step(family[pid]) else {pid}
        return sorted(found)

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 120) -> None:
        """Wait for the run, which is looked at four times a second. Raises TimeoutError, with what its job said."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds:g} s: {what} of {self.folder}; it said\n{self.said()}")
            time.sleep(0.25)

    def said(self) -> str:
        """The end of its job's output, and Slurm's word on it."""
        path = self.folder / "slurm" / f"{self.job}.out"
        log = self.practice / "log" / "slurmctld.log"
        shown = self.run("scontrol", "show", "job", self.job)
        return "\n".join([path.read_text()[-3000:] if path.exists() else "", shown, log.read_text()[-3000:]])

    def goes_on(self, number: int, steps: int = 7, seconds: float = 120) -> None:
        """Wait until an attempt of this number, or a later one, has gone so many steps beyond where it began."""

        def is_under_way() -> bool:
            newest, losses = len(self.records()), self.losses()
            return newest >= number and bool(losses) and losses[-1][0] >= self._begun(newest) + steps

        self.wait(is_under_way, f"{steps} steps of attempt {number}", seconds)

    def ended(self, number: int) -> dict[str, Any]:
        """The record of an attempt, once it is decided what follows."""
        self.wait(lambda: [r for r in self.records()[number - 1 :] if "next" in r], f"a decision on attempt {number}")
        return self.records()[number - 1]

    def starts_now(self, *more: str, seconds: float = 120) -> None:
        """Let the job start that Slurm has requeued. Raises TimeoutError where it does not.

        Two seconds later: nodes that were just told to forget the job refuse a start of the same second, and then Slurm
        requeues it once more. Asked for as long as it waits for its time, which Slurm sets anew when its last process
        is gone.
        """
        self.wait(lambda: self.state() == "PENDING", "a requeue")
        time.sleep(2)
        if more:
            self.run("scontrol", "update", f"JobId={self.job}", *more)

        def goes() -> bool:
            shown = self.run("scontrol", "show", "job", self.job)
            if "JobState=PENDING Reason=BeginTime" in shown:
                with suppress(RuntimeError):  # it has just started
                    self.run("scontrol", "update", f"JobId={self.job}", "StartTime=now")
            return "JobState=PENDING" not in shown

        self.wait(goes, "a start", seconds)

    def resume(self, *overrides: str) -> None:
        """What a person does to go on, who types the line himself where Synthos only prints it."""
        said = self.run(Path(sys.executable).with_name("synthos"), "resume", self.folder, *overrides).splitlines()[-1]
        by_hand = said.startswith("env -i ")
        self.job = self.run("bash", "-c", said).split()[-1] if by_hand else (self.folder / "slurm" / "job").read_text()

    def _begun(self, number: int) -> int:
        """The step that an attempt began with, which is known when it has restored its checkpoint."""
        rows = (self.folder / "metrics.jsonl").read_text().splitlines()
        marks = [json.loads(row) for row in rows if '"attempt/restart_step"' in row]
        return next((int(m["attempt/restart_step"]) for m in marks if m["attempt"] == number), sys.maxsize)


def _is_step(pid: int) -> bool:
    """Whether it is Slurm's own process of a job step."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip() == "slurmstepd"
    return False


Fault = Callable[[Victim], None]


def time_limit(run: Victim) -> None:
    """The limit becomes the next full minute."""
    minutes = run.run("squeue", "--noheader", f"--jobs={run.job}", "--format=%M").split(":")[-2]
    run.run("scontrol", "update", f"JobId={run.job}", f"TimeLimit={int(minutes) + 1}")
    run.ended(len(run.records()))
    run.starts_now("TimeLimit=30")


def preemption(run: Victim) -> None:
    """A job of a higher partition takes the nodes: SIGTERM, 10 s, and 10 s more."""
    _preempt(run)
    run.ended(len(run.records()))
    run.starts_now()


def preemption_by_usr2(run: Victim) -> None:
    """The same on a site that sends the signal of --signal first."""
    conf = run.practice / "slurm.conf"
    former = conf.read_text()
    conf.write_text(f"{former}\nSlurmctldParameters=preempt_send_user_signal\n")
    run.run("scontrol", "reconfigure")
    try:
        preemption(run)
    finally:
        conf.write_text(former)
        run.run("scontrol", "reconfigure")


def slow_save(run: Victim) -> None:
    """A preemption whose time the ranks let pass: they are stopped, and killed before they have saved."""
    for pid in run.processes("synthos.run"):
        os.kill(pid, signal.SIGSTOP)
    _preempt(run)
    run.starts_now()


def requeue(run: Victim) -> None:
    run.run("scontrol", "requeue", run.job)
    run.starts_now()


def truncated(run: Victim) -> None:
    """A requeue; while the job waits, the newest checkpoint loses a byte."""
    run.run("scontrol", "requeue", run.job)
    run.wait(lambda: run.state() == "PENDING", "a requeue")
    newest = max(path for path in (run.folder / "checkpoints").iterdir() if STEP.fullmatch(path.name))
    file = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size - 1)
    run.starts_now()


def node_down(run: Victim) -> None:
    """The last node loses its power, all at once, and has it again when the run goes on elsewhere, or can't."""
    node = run.nodes()[-1]
    os.kill(int((run.practice / "pid" / node).read_text()), signal.SIGKILL)
    for pid in run.processes_on(node):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    up = (ROOT / "slurm" / "practice.sh", "up")
    try:
        run.starts_now(seconds=20)
    except TimeoutError:  # too many of the others have failed twice, and are excluded
        run.run(*up)
        run.starts_now()
    else:
        run.run(*up)


def drain(run: Victim) -> None:
    """Somebody sends the job its notice."""
    run.run("scancel", "--signal=USR2", run.job)
    run.ended(len(run.records()))
    run.starts_now()


def cancelled(run: Victim) -> None:
    """Cancelled, and resumed by hand."""
    run.run("scancel", run.job)
    run.wait(lambda: run.state() == "CANCELLED", "the end of its job")
    run.resume()


def rank_killed(run: Victim) -> None:
    os.kill(run.processes("synthos.run")[0], signal.SIGKILL)


def killed_in_save(run: Victim) -> None:
    """Every rank is killed while a checkpoint is being written: what is there of it never gets its name."""
    checkpoints = run.folder / "checkpoints"

    def is_stopped_in_save() -> bool:
        """The ranks stand still, and what they write has not been renamed."""
        ranks = run.processes("synthos.run")
        until = time.monotonic() + 1
        while time.monotonic() < until:
            if parts := [path for path in checkpoints.iterdir() if path.name.endswith(".part")]:
                for pid in ranks:
                    os.kill(pid, signal.SIGSTOP)
                if parts[0].exists():
                    return True
                for pid in ranks:
                    os.kill(pid, signal.SIGCONT)
        return False

    run.wait(is_stopped_in_save, "a save to be cut short")
    for pid in run.processes("synthos.run"):
        os.kill(pid, signal.SIGKILL)


def agent_killed(run: Victim) -> None:
    os.kill(run.processes("launch.agent")[-1], signal.SIGKILL)


def _preempt(run: Victim) -> None:
    urgent = ["--partition=urgent", "--gres=gpu:2", f"--nodelist={','.join(run.nodes())}", "--wrap=true"]
    run.run("sbatch", "--output=/dev/null", f"--nodes={len(run.nodes())}", *urgent)


FAULTS: tuple[Fault, ...] = (
    time_limit, preemption, preemption_by_usr2, slow_save, requeue, truncated, node_down, drain, cancelled,
    rank_killed, killed_in_save, agent_killed,
)  # fmt: skip
