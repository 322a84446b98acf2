"""What a run remembers of each submission: command, code, packages, machine and inputs, without any secret."""

import filecmp
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch import snapshot
from launch.known import Known
from launch.redact import redact, redact_bytes
from synthos.schema import JobConfig, RunConfig

DRIVER = Path("/proc/driver/nvidia/version")


def record(
    folder: Path, command: Sequence[str], checkout: Path, inputs: Mapping[str, Any], known: Known | None = None
) -> None:
    """Write `provenance/` of the run in `folder`, whose `code` leads to what it runs.

    What is `known` of checkout and machine is not asked again. Its files tell of the newest submission; what an earlier
    one wrote is kept in `provenance/earlier/0001`, and so on.
    """
    part, kept = folder / ".provenance.part", folder / "provenance"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    _write(part, command, checkout, snapshot.tree_name(folder), inputs, known or Known())
    names = sorted(path.name for path in part.iterdir())
    if not kept.is_dir():
        part.rename(kept)
        return
    if filecmp.cmpfiles(part, kept, names, shallow=False)[0] != names:
        _set_aside(kept)
        for name in names:
            (part / name).replace(kept / name)
    shutil.rmtree(part)


def _set_aside(kept: Path) -> None:
    (kept / "earlier").mkdir(exist_ok=True)
    number = len(list((kept / "earlier").glob("[0-9]*"))) + 1
    part = kept / "earlier" / ".part"
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(kept, part, ignore=shutil.ignore_patterns("earlier"))
    part.rename(kept / "earlier" / f"{number:04d}")


def _write(
    folder: Path, command: Sequence[str], checkout: Path, tree: str, inputs: Mapping[str, Any], known: Known
) -> None:
    packages = known.ask("packages", None, installed)
    facts = known.ask("machine", None, lambda: {**environment_facts(), "slurm": _slurm()})
    machine = {**facts, "packages_sha256": hashlib.sha256(packages).hexdigest()}
    # Without a copy (cluster=debug) the checkout itself runs, with whatever is saved there while it does.
    code = {
        **known.ask("git", checkout, lambda: snapshot.facts(checkout)),
        "tree": tree,
        "runs": "copy" if tree else "checkout",
    }
    (folder / "command.txt").write_text(redact(shlex.join(command)) + "\n")
    (folder / "git.json").write_text(json.dumps(code, indent=1))
    # Relative: around a copy lies the checkout that it was made of, which may be another by now.
    changes = known.ask("changes", checkout, lambda: redact_bytes(_changes(checkout)))
    (folder / "changes.patch").write_bytes(changes)
    (folder / "packages.txt").write_bytes(packages)
    (folder / "environment.json").write_text(json.dumps(machine, indent=1))
    (folder / "inputs.json").write_text(json.dumps(inputs, indent=1))


def _changes(checkout: Path) -> bytes:
    return snapshot.git(checkout, "diff", "--binary", "--relative", "HEAD") or b""


def installed() -> bytes:
    """Every installed package with its version, a line each."""
    packages = {f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions()}
    return ("\n".join(sorted(packages, key=str.lower)) + "\n").encode()


def environment_facts() -> dict[str, Any]:
    """The machine that this process runs on, and its torch. `driver` is None where there is no NVIDIA driver."""
    torch = _torch()
    driver = re.search(r"\s(\d+\.\d+[.\d]*)\s", DRIVER.read_text()) if DRIVER.is_file() else None
    return {
        "host": socket.gethostname(),
        "user": os.environ.get("USER") or str(os.getuid()),  # in a container it may have no name
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.get("__version__"),
        "cuda": torch.get("cuda"),
        "driver": driver[1] if driver else None,
    }


def _torch() -> dict[str, Any]:
    """What torch says of its version, without the seconds that importing it takes."""
    found = importlib.util.find_spec("torch")
    return runpy.run_path(str(Path(found.origin).with_name("version.py"))) if found and found.origin else {}


def _slurm() -> str | None:
    with suppress(FileNotFoundError):
        return subprocess.run(["sbatch", "--version"], capture_output=True, text=True).stdout.strip() or None
    return None


def inputs_of(config: JobConfig, data: str | None = None) -> dict[str, Any]:
    """What a job reads: the fingerprint `data` of its samples, and its models by path or hub id and revision."""
    if not isinstance(config, RunConfig):
        return {"weights": getattr(config, "weights", None)}
    parts = {
        name: {"path": part.path, "subfolder": part.subfolder, "revision": part.revision}
        for name, part in config.model.parts.items()
    }
    return {"data": data, "model": config.model.name, "parts": parts, "init_from": config.init_from}
