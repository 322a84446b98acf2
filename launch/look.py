"""How a run is, at this moment: from its verdict, its ledger, its heartbeat, its lock and its job in the queue."""

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median

from launch import squeue
from launch.attempts import CANCELLED, SIGNAL_CAUSES
from launch.runs import is_held, signature
from launch.tell import duration
from synthos.files import DamagedFile, parse_object, read_cause, read_heartbeat, tail
from synthos.run import failure_file
from synthos.schema import GenerateConfig, RunConfig, read_job

STALLED_SECONDS = 60.0  # without a heartbeat, or
STALLED_STEPS = 3  # so many median steps, whatever is longer
STARTING_SECONDS = 3600.0  # to the first step, with loading, restoring and a validation before it
QUIET_SECONDS = 1800.0  # for a save or an export, whose own time may not be known
TAIL_BYTES = 2**16  # of metrics.jsonl: the newest steps
NO_PROGRESS = "no_progress"  # begins the reason of `launch.decision` for giving up
ALIVE = ("queued", "starting", "running", "stalled", "ending")
WRONG = ("stalled", "failed", "cancelled", "lost", "unknown", "unreadable")
READERS = 8  # threads: a folder may be far away


@dataclass(frozen=True)
class Look:
    """One run; what is not known is None, or empty.

    Attributes:
        state: queued, starting, running, stalled, ending (its attempt is closed, and what follows not yet decided),
            stopped, cancelled, failed, done, lost (its attempt was never closed, and neither job nor process is left),
            prepared (never started), unknown (Slurm can't be asked), unreadable.
        detail: why, in words.
        step, last_step: how far it is, in `unit`s.
        changed: seconds since the epoch when the newest of this was written.
    """

    name: str
    group: str
    signature: str
    folder: str
    state: str
    detail: str
    step: int | None = None
    last_step: int | None = None
    unit: str = "step"
    images_per_s: float | None = None
    eta_s: float | None = None
    heartbeat_age_s: float | None = None
    attempt: int = 0
    job: str = ""
    nodes: str = ""
    changed: float = 0.0

    @property
    def alive(self) -> bool:
        """Whether it has a job or a process."""
        return self.state in ALIVE

    @property
    def goes_on(self) -> bool:
        """Whether more may come of it: also where Slurm can't be asked just now."""
        return self.alive or self.state == "unknown"

    @property
    def wrong(self) -> bool:
        """Whether a person should look at it."""
        return self.state in WRONG


def look_at(folders: Sequence[Path]) -> tuple[list[Look], str]:
    """Every run, and why Slurm could not be asked about them, if it could not; one squeue in all."""
    queue = squeue.ask(folders)
    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(lambda folder: look(folder, queue), folders)), queue.problem


def look(folder: Path, queue: squeue.Queue) -> Look:
    """One run."""
    try:
        return _Folder(folder, queue).look()
    except (OSError, ValueError, KeyError, TypeError) as error:  # a damaged file of one run hides no other
        named = isinstance(error, OSError) and error.filename
        why = f"{error.filename}: {error.strerror}" if named else str(error)  # type: ignore[union-attr]
        return Look(folder.name, folder.parent.name, signature(folder), str(folder), "unreadable", why)


class _Folder:
    """The small files of one run folder. Raises OSError and ValueError for what can't be read."""

    def __init__(self, folder: Path, queue: squeue.Queue) -> None:
        self.folder, self.problem = folder, queue.problem
        control = folder / "control"
        self.numbers = sorted(int(name) for name in _names(folder / "attempts") if name.isdigit())
        self.attempt = self.numbers[-1] if self.numbers else 0
        path = folder / "attempts" / f"{self.attempt:04d}" / "attempt.json"
        self.record = parse_object(path) if self.attempt else {}
        self.verdict, self.beat = parse_object(control / "verdict.json"), read_heartbeat(folder)
        self.cancelled, self.asked = parse_object(control / CANCELLED), read_cause(control / "stop")
        jobs = queue.of(folder)
        running = [job for job in jobs if not job.pending]
        self.job = next(iter(running or jobs), None)
        self.submitted = folder / "slurm" / "job"
        files = [path, control / "verdict.json", control / "heartbeat.json", self.submitted, folder / "config.yaml"]
        self.changed = max(_time(file) for file in files)
        _check_config(files[-1])

    def look(self) -> Look:
        state, detail = self._state()
        beat = self.beat if self.beat.get("attempt") == self.attempt else {}
        shown = state in ("running", "stalled") and beat
        step = beat.get("step") if shown else self.record.get("end_step", self.record.get("start_step"))
        return Look(
            name=self.folder.name,
            group=self.folder.parent.name,
            signature=signature(self.folder),
            folder=str(self.folder),
            state=state,
            detail=detail,
            step=step if step is not None else self.beat.get("step"),
            last_step=self.beat.get("last_step"),
            unit=self.beat.get("unit", "step"),
            images_per_s=beat.get("images_per_s") if shown else None,
            eta_s=beat.get("eta_s") if state == "running" and beat else None,
            heartbeat_age_s=round(time.time() - beat["time"], 1) if shown else None,
            attempt=self.attempt,
            job=self.job.job if self.job else _text(self.submitted),
            nodes=self.job.nodes if self.job else "",
            changed=self.changed,
        )

    def _state(self) -> tuple[str, str]:
        """The run's state, and why."""
        if self.job and self.job.pending:
            why = f" ({self.record['cause']})" if "cause" in self.record else ""
            again = f", again after attempt {self.attempt}{why}" if self.attempt else ""
            return "queued", f"{self.job.reason}{again}{self._wish()}"
        is_open = bool(self.record) and "ended" not in self.record
        following = self.record.get("next", {})  # what the agent has decided to do after a closed attempt
        if self.job and self.job.state == "COMPLETING" and self.record.get("job", "").split(".")[0] == self.job.job:
            return self._running() if is_open else self._between()  # also once it counts as the next start
        if self.job and self.record.get("job") != self.job.start:
            return "starting", f"job {self.job.job} on {self.job.nodes}{self._wish()}"
        if self.job:
            return self._running() if is_open else self._between()
        if (is_open or not self.record or following.get("decision") == "restart") and is_held(self.folder):
            return self._running() if is_open else self._between() if self.record else ("starting", "")
        if self._unanswered(is_open):
            return "unknown", "Slurm can't be asked about its job"
        if self.cancelled and (self.cancelled["job"], self.cancelled["attempt"]) == (self._last_job(), self.attempt):
            what = f"job {self.cancelled['job']}" if self.cancelled["job"] else f"attempt {self.attempt}"
            return "cancelled", f"{what} by {self.cancelled['by']}"
        if is_open and self.verdict.get("attempt") == self.attempt and self.verdict["status"] != "failed":
            return str(self.verdict["status"]), str(self.verdict["cause"])  # its job was killed before it was closed
        if is_open:
            where = f"on {self.record['host']}, process {self.record['pid']}"
            return "lost", f"attempt {self.attempt} {where} was never closed, and no job and no process is left"
        if self._waits():
            return "lost", f"job {_text(self.submitted)} left the queue without an attempt; see {self.folder / 'slurm'}"
        if following.get("decision") in ("restart", "requeue"):
            why = f"attempt {self.attempt} was to be followed by another ({following['reason']})"
            return "lost", f"{why}, and no job and no process is left"
        return self._ended()

    def _between(self) -> tuple[str, str]:
        """The state of a run whose newest attempt is closed, while its job or its process is still there."""
        following = self.record.get("next", {})
        match following.get("decision"):
            case "restart":
                ended = datetime.fromisoformat(self.record["ended"]).timestamp()
                left = ended + following.get("wait_seconds", 0) - time.time()
                wait = f" in {left:.0f} s" if left > 0 else ""
                return "starting", f"again after attempt {self.attempt}{wait}: {following['reason']}{self._wish()}"
            case "requeue":
                return "queued", f"again after attempt {self.attempt}: {following['reason']}{self._wish()}"
            case "end":
                return self._ended()  # the rest of its job may take long
        return "ending", f"attempt {self.attempt} is over, and what follows is being decided"

    def _wish(self) -> str:
        """A person's, that it stop, before an attempt has heard of it."""
        return "" if self.asked in ("", *SIGNAL_CAUSES) else "; is asked to stop"

    def _unanswered(self, is_open: bool) -> bool:
        """Whether only Slurm could tell: a job's attempt is open, or another is to follow, or a job came after it."""
        goes_on = is_open or self.record.get("next", {}).get("decision") in ("restart", "requeue")
        return bool(self.problem) and ((goes_on and bool(self.record.get("job"))) or self._waits())

    def _waits(self) -> bool:
        """Whether a job was submitted that has opened no attempt."""
        job = _text(self.submitted)
        if not job or self.record.get("job", "").split(".")[0] == job:
            return False
        return not self.record or _time(self.submitted) > datetime.fromisoformat(self.record["started"]).timestamp()

    def _last_job(self) -> str:
        """Slurm's id of the job that the run had last; empty where it was none."""
        return _text(self.submitted) if self._waits() else str(self.record.get("job", "")).split(".")[0]

    def _running(self) -> tuple[str, str]:
        if self.beat.get("attempt") != self.attempt:
            age = time.time() - datetime.fromisoformat(self.record["started"]).timestamp()
            state = "starting" if age < STARTING_SECONDS else "stalled"
            return state, f"no step of attempt {self.attempt} yet, {duration(age)} after its start{self._wish()}"
        age = time.time() - self.beat["time"]
        doing = self.beat.get("doing", "")
        save = 2 * (self.beat.get("save_seconds") or 0)  # two may have to be waited for
        patience = max(STALLED_SECONDS, save, QUIET_SECONDS if doing else 0)
        if age > patience and age > STALLED_STEPS * self._step_seconds():
            return "stalled", f"no heartbeat for {age:.0f} s" + (f", since it {doing}" if doing else "")
        by_signal = f"is told to stop ({self.asked})" if self.asked else ""
        return "running", "; ".join(filter(None, [self._wish().removeprefix("; ") or by_signal, doing]))

    def _step_seconds(self) -> float:
        """Median time of the newest steps, or of a call that makes pictures."""
        config = read_job(self.folder / "config.yaml")
        if isinstance(config, GenerateConfig):
            return config.micro * config.ranks / max(float(self.beat["images_per_s"]), 1e-9)
        assert isinstance(config, RunConfig)
        rates = step_rates(self.folder / "metrics.jsonl") or [float(self.beat["images_per_s"])]
        return config.batch.size / max(median(rates), 1e-9)

    def _ended(self) -> tuple[str, str]:
        """The state of a run whose newest attempt is closed, or that has none."""
        if not self.record:
            lost = "lost", f"attempt {self.attempt} ended before it had a record"
            return lost if self.attempt else ("prepared", "never started")
        status, cause, following = self.record["status"], self.record["cause"], self.record.get("next", {})
        if following.get("failed") or str(following.get("reason", "")).startswith(NO_PROGRESS):
            return "failed", f"{cause}: {following['reason']}"  # it was to go on, and will not
        if status == "failed":
            own = self.verdict if self.verdict.get("attempt") == self.attempt else {}
            told = (
                self.record if "rank" in self.record else parse_object(failure_file(self.folder, self.attempt)) or own
            )
            where = f"rank {told['rank']}: " if "rank" in told else ""
            return "failed", f"{where}{told.get('message') or cause}"
        return str(status), "" if status == "done" else str(cause)


def step_rates(metrics: Path) -> list[float]:
    """Samples per second of the newest steps."""
    rates = []
    for line in tail(metrics, TAIL_BYTES).splitlines():
        if '"train/samples_per_s"' in line and line.startswith("{") and line.endswith("}"):
            rates.append(float(json.loads(line)["train/samples_per_s"]))
    return rates


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""


def _check_config(path: Path) -> None:
    """Raise DamagedFile for a config that is not as it was written: to parse all of a thousand would take seconds."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise DamagedFile(path, "it is gone") from None
    if not (b"stage: " in text and text.endswith(b"\n")):
        raise DamagedFile(path, "it is empty" if not text else "it is not what was written")


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
