"""`synthos logs`: what a run printed, the rank that failed first on top."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launch import squeue
from launch.attempts import attempt_folder
from launch.look import look
from launch.runs import find_one
from launch.tell import new_parser, print_json, warn
from synthos.files import read_json, tail
from synthos.run import failure_file

POLL_SECONDS = 0.5
STATE_SECONDS = 5  # between two looks at the queue
BYTES_PER_LINE = 2000  # of a log, at most, that are read for a line that is shown


def main(arguments: list[str]) -> int:
    """Print the end of a run's logs; returns 1 where there are none."""
    parser = new_parser("logs", __doc__, "one")
    parser.add_argument(
        "-f", "--follow", action="store_true", help="go on as they grow, through every attempt or only --attempt"
    )
    parser.add_argument("--rank", type=int, help="this rank's own log, not what its node printed")
    parser.add_argument("--attempt", type=int, help="default: the newest")
    parser.add_argument(
        "--lines", type=int, default=100, help="of each file, from its end; 0: all, as with -f --attempt. Default: 100"
    )
    args = parser.parse_args(arguments)
    if args.follow and args.json:
        raise ValueError("--follow, --json: exclude each other; expected one of the two")
    folder = find_one(args.run)
    attempts = _attempts(folder)
    if args.attempt is not None and args.attempt not in attempts:
        known = ", ".join(map(str, attempts)) or "none yet"
        raise ValueError(f"--attempt: {args.attempt} is none of {folder.name}; expected one of {known}")
    attempt = args.attempt if args.attempt is not None else (attempts[-1] if attempts else 0)
    if args.follow:
        if args.attempt is not None and "ended" in _record(folder, attempt):
            log_files(folder, attempt, args.rank, None)  # raises: a rank without a log gets none any more
        return _follow(folder, args.attempt, args.rank, args.lines)
    failure = _failure(folder, attempt) if attempt else {}
    files = log_files(folder, attempt, args.rank, failure.get("rank"))
    if args.json:
        shown = [{"file": str(file), "lines": _last_lines(file, args.lines)} for file in files]
        print_json({"run": folder.name, "attempt": attempt, "failure": failure or None, "logs": shown})
    else:
        _print(folder, attempt, failure, files, args.lines)
    return int(not files)


def _failure(folder: Path, attempt: int) -> dict[str, Any]:
    """What failed first: the rank that was killed, or else the first to say something."""
    record = _record(folder, attempt)
    killed = {key: record[key] for key in ("cause", "message", "rank")} if "rank" in record else {}
    return read_json(failure_file(folder, attempt)) | killed


def log_files(folder: Path, attempt: int, rank: int | None, failed: int | None) -> list[Path]:
    """The logs of an attempt: of one rank, or of all nodes after that of the rank that failed first.

    Before the first attempt it is what the job printed. Raises ValueError for a rank that the attempt has not.
    """
    if not attempt:
        outputs = sorted((folder / "slurm").glob("*.out"), key=lambda file: file.stat().st_mtime)
        return outputs[-1:]
    own = attempt_folder(folder, attempt)
    if rank is not None:
        file = _rank_log(folder, attempt, rank)
        if not file.is_file():
            ranks = ", ".join(str(int(path.stem.removeprefix("rank-"))) for path in sorted(own.glob("rank-*.log")))
            raise ValueError(f"--rank: {rank} has no log in attempt {attempt}; expected one of {ranks or 'none yet'}")
        return [file]
    first = [_rank_log(folder, attempt, failed)] if failed is not None else []
    nodes = sorted(own.glob("node-*.log"))
    return [file for file in [*first, *(nodes or sorted(own.glob("rank-*.log")))] if file.is_file()]


def _print(folder: Path, attempt: int, failure: dict[str, object], files: Sequence[Path], lines: int) -> None:
    _print_failure(attempt, failure)
    if not files:
        warn(f"{folder.name} has no logs yet")
    _print_files(files, lines)


def _print_failure(attempt: int, failure: dict[str, object]) -> None:
    if failure:
        where = f" first at rank {failure['rank']}" if "rank" in failure else ""
        print(f"attempt {attempt} failed{where}: {failure['message']}")


def _print_files(files: Sequence[Path], lines: int) -> None:
    for file in dict.fromkeys(files):
        print(f"==> {file} <==", *_last_lines(file, lines), sep="\n")


def _last_lines(file: Path, lines: int) -> list[str]:
    text = tail(file, lines * BYTES_PER_LINE) if lines else file.read_text(errors="replace")
    return text.splitlines()[-lines:]


def _follow(folder: Path, only: int | None, rank: int | None, lines: int) -> int:
    """Show the logs of the newest attempt, and of each that comes after it, until the run is over; or of `only` one.

    After what a failed attempt printed comes what failed first, and the log of that rank.
    """
    shown: dict[Path, int] = {}
    told: set[int] = set()
    looked, last, attempt = float("-inf"), None, only or _newest(folder)
    try:
        while True:
            over = False
            if time.monotonic() - looked > STATE_SECONDS:
                looked = time.monotonic()
                one = look(folder, squeue.ask([folder]))
                over = not one.goes_on
            newest = _newest(folder)  # after the look, and before the logs, so that no end is missed
            record = _record(folder, attempt) if attempt else {}
            for file, text in _grown(folder, attempt, rank, shown, 0 if only else lines):
                if file != last:
                    print(f"==> {file} <==")
                    last = file
                print(text, end="", flush=True)
            # Which rank was killed is known once it is decided what follows.
            queued = attempt and one.state == "queued" and one.attempt == attempt  # its batch script was killed, too
            settled = over or newest != attempt or "next" in record or queued
            if attempt and attempt not in told and settled:
                told.add(attempt)
                _tell_failure(folder, attempt, rank, lines)
                last = None
            if only and settled and "ended" in record:
                print(f"{folder.name}, attempt {only}: {record['status']}, {record['cause']}")
                return int(record["status"] == "failed")
            if newest != attempt and not only:  # at once: it may be over as well
                attempt, looked = newest, float("-inf")
                continue
            if over:
                print(f"{one.name}: {one.state}" + (f", {one.detail}" if one.detail else ""))
                return int(one.wrong)
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        return 0


def _tell_failure(folder: Path, attempt: int, rank: int | None, lines: int) -> None:
    """What failed first in an attempt, if anything did, and the log of that rank, unless it is the one followed."""
    failure = _failure(folder, attempt)
    _print_failure(attempt, failure)
    if failure.get("rank") not in (None, rank):
        own = _rank_log(folder, attempt, failure["rank"])
        _print_files([own] if own.is_file() else [], lines)


def _grown(
    folder: Path, attempt: int, rank: int | None, shown: dict[Path, int], lines: int
) -> Iterator[tuple[Path, str]]:
    """What is new in the logs of an attempt; of one seen for the first time, the end."""
    if rank is not None and attempt:
        files = [_rank_log(folder, attempt, rank)]
    else:
        files = log_files(folder, attempt, None, None)
    for file in files:
        if file not in shown:  # of one that came while it is followed, everything
            shown[file] = _start(file, lines) if not shown else 0
        if text := _read_on(file, shown[file]):
            shown[file] += len(text)
            yield file, text.decode("utf-8", "replace")


def _start(file: Path, lines: int) -> int:
    """Where the last lines of a file begin; 0 where all are wanted."""
    if not lines or not file.is_file():
        return 0
    return file.stat().st_size - len("\n".join([*_last_lines(file, lines), ""]).encode())


def _read_on(file: Path, offset: int) -> bytes:
    """The whole lines after `offset`."""
    if not file.is_file():
        return b""
    with file.open("rb") as stream:
        stream.seek(max(offset, 0))
        text = stream.read()
    return text[: text.rfind(b"\n") + 1]


def _attempts(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "attempts").glob("[0-9]*") if path.name.isdigit())


def _newest(folder: Path) -> int:
    """The newest attempt; 0 before the first."""
    return max(_attempts(folder), default=0)


def _record(folder: Path, attempt: int) -> dict[str, Any]:
    return read_json(attempt_folder(folder, attempt) / "attempt.json")


def _rank_log(folder: Path, attempt: int, rank: int) -> Path:
    return attempt_folder(folder, attempt) / f"rank-{rank:05d}.log"
