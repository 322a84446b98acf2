"""Entry of every rank: frozen config -> objects -> its stage -> verdict.

torchrun ... -m synthos.run RUN_DIR
"""

import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from synthos.files import create_json, read_json, write_json
from synthos.schema import GenerateConfig, JobConfig, RunConfig, read_job


def main(run_dir: Path, attempt: int) -> dict[str, Any]:
    """Run one attempt of the run in `run_dir` on this rank; returns the verdict, which rank 0 has also written.

    An error of any rank is written as the verdict too, and raised.
    """
    from synthos.build import build_job
    from synthos.generate_job import generate
    from synthos.train.distributed import open_world
    from synthos.train.loop import train
    from synthos.train.stop import Stop

    # Wan returns a view; its output is cast or compared, never written to, so FSDP2's advice does not apply.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    run_dir = run_dir.resolve()
    config = read_job(run_dir / "config.yaml")
    assert isinstance(config, RunConfig | GenerateConfig)
    rank = int(os.environ.get("RANK", "0"))
    handler = _open_log(run_dir / "attempts" / f"{attempt:04d}" / f"rank-{rank:05d}.log")
    verdict: dict[str, Any] = {"status": "failed", "step": None}
    report = world = None
    try:
        _check_imported(run_dir, config)
        if config.ranks > 1:
            _arrive(run_dir, attempt)
        world = open_world(config)
        with Stop(run_dir / "control" / "stop", world) as stop:
            seconds = world.meet()
            if world.is_main and world.size > 1:
                write_json(collective_file(run_dir, attempt), {"ranks": world.size, "seconds": round(seconds, 3)})
            if isinstance(config, GenerateConfig):
                verdict = generate(config, run_dir, world, stop, attempt)
            else:
                job = build_job(config, run_dir, world, stop, attempt)
                report = job.report
                verdict = train(job)
                job.stream.close()
            world.barrier()
    finally:
        cause, message = _error()
        verdict = {"cause": cause, **verdict, "attempt": attempt, "rank": rank, "message": message}
        if rank == 0 or verdict["status"] == "failed":
            write_verdict(run_dir, verdict)
        if report:  # after the verdict: W&B may take its time, or fail
            report.close(verdict)
        logging.getLogger("synthos").removeHandler(handler)
        handler.close()
        if world:
            world.close()
    return verdict


def _arrive(run_dir: Path, attempt: int) -> None:
    """Leave a sign that this rank has come, before it waits for the others."""
    folder = arrivals(run_dir, attempt)
    folder.mkdir(exist_ok=True)
    (folder / f"rank-{os.environ.get('SYNTHOS_NODE', '0')}-{os.environ.get('LOCAL_RANK', '0')}").touch()


def _check_imported(run_dir: Path, config: JobConfig) -> None:
    """Only the code that was submitted is run; `cluster=debug` runs the checkout."""
    code = run_dir / "code"
    if config.cluster.backend != "debug" and code.is_dir() and code.resolve() not in Path(__file__).resolve().parents:
        raise RuntimeError(f"the code of this run is {code.resolve()}, but this rank has imported {__file__}")


def _error() -> tuple[str, str]:
    """What the error being raised right now is taken for, and its one line; logged whole. Empty when there is none.

    What a user wrote, or did not install, would fail again; all else may be the world.
    """
    error = sys.exc_info()[1]
    if error is None:
        return "", ""
    logging.getLogger("synthos").error("%s", traceback.format_exc())
    return "config" if isinstance(error, ValueError | ImportError) else "crash", f"{type(error).__name__}: {error}"


def _open_log(path: Path) -> logging.Handler:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("synthos")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    return handler


def write_verdict(run_dir: Path, verdict: dict[str, Any]) -> None:
    """Write how an attempt ended. Of several ranks that fail, the first tells why: the others lost their peers."""
    (run_dir / "control").mkdir(exist_ok=True)
    if verdict["status"] != "failed" or create_json(failure_file(run_dir, verdict["attempt"]), verdict):
        write_json(run_dir / "control" / "verdict.json", verdict)


def read_verdict(run_dir: Path) -> dict[str, Any]:
    """The newest verdict of a run, empty where there is none."""
    return read_json(run_dir / "control" / "verdict.json")


def failure_file(run_dir: Path, attempt: int) -> Path:
    """What the first rank to fail in an attempt says of it."""
    return run_dir / "attempts" / f"{attempt:04d}" / "failure.json"


def arrivals(run_dir: Path, attempt: int) -> Path:
    """Where the nodes of an attempt, and its ranks, leave a file each before they meet: rank-<node>-<local rank>."""
    return run_dir / "attempts" / f"{attempt:04d}" / "preflight"


def collective_file(run_dir: Path, attempt: int) -> Path:
    """What the main rank writes once all ranks have met."""
    return run_dir / "attempts" / f"{attempt:04d}" / "collective.json"


def _run_as_command(run_dir: Path, attempt: int) -> int:
    """Run, and return the exit code. Of several ranks that fail, only the first to say so prints its traceback."""
    try:
        main(run_dir, attempt)
    except Exception:
        rank, first = int(os.environ.get("RANK", "0")), read_json(failure_file(run_dir, attempt)).get("rank")
        if first in (None, rank):
            traceback.print_exc()
        else:
            print(f"rank {rank} ends, because rank {first} has failed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    code = _run_as_command(Path(sys.argv[1]), int(os.environ.get("SYNTHOS_ATTEMPT", "1")))
    # All is written and closed. A thread of torch's that is still alive can abort an ordinary exit ("terminate called
    # without an active exception"), and torchrun would then end the other ranks in the middle of theirs.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
