"""The code that a run was submitted with: a read-only copy of the working tree, named by its content.

`runs/.code/<tree>/` serves every run of that code, and the run's `code` leads there. <tree> is what git would call
these files as a tree; git is asked for their names only, so its index and its objects stay as they are. A copy appears
under its name when it is whole, and is never written to again: whatever happens to the checkout, a job runs what it was
submitted with.
"""

import errno
import hashlib
import os
import re
import shutil
import socket
import stat
import subprocess
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import synthos
from launch.redact import secret_values
from synthos.files import read_json, write_json

STORE = ".code"  # in runs_dir
PACKAGES = ("synthos", "launch", "configs", "slurm")  # what is copied where git does not tell
UNTRACKED_MB = 5.0  # of one file that git does not know
TOTAL_MB = 100.0
KEPT_SECRET = (".env", ".env.*", ".netrc", "*.pem", "id_rsa*", "id_ed25519*")  # names under which people keep secrets
IGNORE = "; the code of a run is copied and kept: list it in .gitignore, move it out of the checkout, or git add it"


def take(checkout: Path, store: Path, leave_out: Sequence[Path] = ()) -> Path:
    """The copy of the working tree in `store`, made if there is none yet.

    Args:
        checkout: what to copy: in a git repository what it knows and what it does not ignore, else `PACKAGES`.
        store: the folder of all copies.
        leave_out: folders whose files are no code.

    Raises RuntimeError where the copy can't be written.
    """
    names = [name for part in list_files(checkout, leave_out) for name in part]
    kept = store / tree_of(checkout, names)
    if _renewed(kept):
        return kept
    part = store / f".{socket.gethostname()}-{uuid.uuid4().hex}.part"
    try:
        part.mkdir(parents=True)
        _copy(checkout, names, part)
        kept = store / tree_of(part, names)  # of what was copied: a file may have been saved just now
        write_json(store / f"{kept.name}.json", facts(checkout))
        _put(part, kept)
    except OSError as error:
        raise RuntimeError(f"the code can't be copied to {store}: {error.strerror}") from None
    finally:
        remove(part)
    return kept


def _renewed(kept: Path) -> bool:
    """Whether there is such a copy; `synthos gc` leaves it alone for a while, until its run has a config."""
    try:
        os.utime(kept)
    except PermissionError:  # another user's, as old as it is
        pass
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _copy(checkout: Path, names: Iterable[str], part: Path) -> None:
    for name in names:
        source, copy = checkout / name, part / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            copy.symlink_to(os.readlink(source))
        else:
            shutil.copyfile(source, copy)
            readable = copy.stat().st_mode & 0o444
            copy.chmod(readable | (readable >> 2 if source.stat().st_mode & stat.S_IXUSR else 0))


def _put(part: Path, kept: Path) -> None:
    """Give a whole copy its name; another process may have done the same meanwhile."""
    for folder, _, _ in os.walk(part):
        os.chmod(folder, os.stat(folder).st_mode & ~0o222)
    try:
        part.rename(kept)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


def remove(kept: Path) -> None:
    """Delete a copy, or what there is of it. Runs may still lead there: whoever calls this has looked."""
    for folder, _, _ in os.walk(kept):
        os.chmod(folder, 0o700)
    shutil.rmtree(kept, ignore_errors=True)
    if not kept.name.startswith("."):
        kept.with_name(f"{kept.name}.json").unlink(missing_ok=True)


def link(folder: Path, kept: Path) -> None:
    """Let `code` in a run folder lead to a copy."""
    part = folder / ".code.part"
    part.unlink(missing_ok=True)
    part.symlink_to(os.path.relpath(kept.resolve(), folder.resolve()))
    part.replace(folder / "code")


def code_of(folder: Path) -> Path:
    """Where the processes of a run start. Raises ValueError where the folder has no code."""
    code = folder / "code"
    if not code.is_dir():
        raise ValueError(f"{code} does not lead to a copy of the code; submit the run again")
    return code.resolve()


def tree_name(folder: Path) -> str:
    """The tree that a run folder leads to; empty where it runs the checkout itself."""
    return (folder / "code").resolve().name if (folder / "code").is_dir() else ""


def check_imported(folder: Path) -> None:
    """Raise ValueError where this process has not imported the code of the run in `folder`."""
    code, imported = code_of(folder), Path(synthos.__file__).resolve()
    if code not in imported.parents:
        raise ValueError(f"the code of this run is {code}, but this process has imported {imported}")


def is_copy(checkout: Path) -> bool:
    """Whether a checkout is itself a copy: that of a job which submits another."""
    return checkout.parent.name == STORE and re.fullmatch("[0-9a-f]{40}", checkout.name) is not None


def problems(checkout: Path, leave_out: Sequence[Path] = ()) -> Iterator[str]:
    """A line for each file that should not be copied, and for a working tree that can't be."""
    try:
        known, unknown = list_files(checkout, leave_out)
    except RuntimeError as error:
        yield f"code: {error}"
        return
    sizes = {name: (checkout / name).lstat().st_size / 1e6 for name in (*known, *unknown)}
    for name in unknown:
        if sizes[name] > UNTRACKED_MB:
            yield f"code: {name} has {sizes[name]:.0f} MB, at most {UNTRACKED_MB:g} are allowed{IGNORE}"
        elif any(fnmatch(Path(name).name, pattern) for pattern in KEPT_SECRET):
            yield f"code: {name} is a file for secrets by its name{IGNORE}"
    if (total := sum(sizes.values())) > TOTAL_MB:
        yield f"code: the files have {total:.0f} MB, at most {TOTAL_MB:g} are allowed: {_largest(sizes)}{IGNORE}"
        return
    changed = _lines(git(checkout, "diff", "--name-only", "-z", "--relative", "HEAD"))
    for name in sorted({*changed, *unknown} & sizes.keys()):
        content = (checkout / name).read_bytes() if (checkout / name).is_file() else b""
        for variable, value in secret_values(os.environ).items():
            if value.encode() in content:
                yield f"code: {name} holds the value of ${variable}, and the code of a run is copied and kept"


def _largest(sizes: Mapping[str, float]) -> str:
    """The three largest things in the checkout's top folder, by the sizes of its files."""
    tops: dict[str, float] = {}
    for name, size in sizes.items():
        top = name.split("/")[0]
        tops[top] = tops.get(top, 0) + size
    return ", ".join(f"{name} {tops[name]:.0f} MB" for name in sorted(tops, key=tops.__getitem__, reverse=True)[:3])


def list_files(checkout: Path, leave_out: Sequence[Path] = ()) -> tuple[list[str], list[str]]:
    """The files to copy: those that git knows, and those that it neither knows nor ignores.

    Where the checkout is itself a copy, or no part of a git repository, none is unknown. Raises RuntimeError where git
    does not tell.
    """
    if is_copy(checkout):
        return _walk(checkout, ["."]), []
    known = git(checkout, "ls-files", "-z", "--cached", "--deduplicate")
    if known is None and (checkout / ".git").exists():
        raise RuntimeError(f"git can't list the files of {checkout}: {_complaint(checkout)}")
    others = git(checkout, "ls-files", "-z", "--others", "--exclude-standard")
    if "synthos/__init__.py" not in _lines(known) + _lines(others):
        return _walk(checkout, PACKAGES), []
    left_out = [os.path.relpath(folder.resolve(), checkout.resolve()) for folder in leave_out]
    return _expand(checkout, _lines(known), left_out), _expand(checkout, _lines(others), left_out)


def _expand(checkout: Path, names: Iterable[str], left_out: Sequence[str]) -> list[str]:
    """The names of what is there; a repository within the repository by its own files."""
    found = []
    for name in names:
        path = checkout / name
        if any(f"{name}/".startswith(f"{folder}/") for folder in left_out):
            continue
        if path.is_dir() and not path.is_symlink():
            if (path / ".git").exists():
                inner = _lines(git(path, "ls-files", "-z", "--cached", "--others", "--exclude-standard"))
                found += [f"{name.rstrip('/')}/{file}" for file in _expand(path, inner, [])]
        elif os.path.lexists(path):  # else it was deleted, and git still knows it
            found.append(name)
    return found


def _walk(root: Path, folders: Iterable[str]) -> list[str]:
    names = []
    for top in folders:
        for folder, below, files in os.walk(root / top):
            links = [name for name in below if (Path(folder) / name).is_symlink()]
            below[:] = [name for name in below if name != "__pycache__"]
            names += [os.path.relpath(os.path.join(folder, name), root) for name in [*files, *links]]
    return names


def tree_of(root: Path, names: Iterable[str]) -> str:
    """The name that git would give these files as a tree: 40 hex digits, of names, contents and executable bits."""
    top: dict[str, Any] = {}
    for name in names:
        *folders, last = name.split("/")
        node = top
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = _blob(root / name)
    return _tree(top).hex()


def _blob(path: Path) -> tuple[bytes, bytes]:
    if path.is_symlink():
        return b"120000", _object(b"blob", os.fsencode(os.readlink(path)))
    mode = b"100755" if path.stat().st_mode & stat.S_IXUSR else b"100644"
    return mode, _object(b"blob", path.read_bytes())


def _tree(node: dict[str, Any]) -> bytes:
    """Git orders the entries of a tree as if the names of folders ended in a slash."""
    entries = []
    for name, entry in node.items():
        is_folder = isinstance(entry, dict)
        mode, digest = (b"40000", _tree(entry)) if is_folder else entry
        key = os.fsencode(name)
        entries.append((key + b"/" if is_folder else key, mode + b" " + key + b"\0" + digest))
    return _object(b"tree", b"".join(text for _, text in sorted(entries)))


def _object(kind: bytes, content: bytes) -> bytes:
    return hashlib.sha1(kind + b" %d\0" % len(content) + content).digest()


def facts(checkout: Path) -> dict[str, Any]:
    """Commit, branch and files that git does not know, of the checkout or of the one that it is a copy of."""
    return read_json(checkout.with_name(f"{checkout.name}.json")) if is_copy(checkout) else git_facts(checkout)


def git_facts(checkout: Path) -> dict[str, Any]:
    """Commit, branch and files that git does not know; all empty outside of a git repository."""
    return {
        "commit": (git(checkout, "rev-parse", "--verify", "HEAD") or b"").decode().strip(),
        "branch": (git(checkout, "branch", "--show-current") or b"").decode().strip(),
        "changed": bool(git(checkout, "status", "--porcelain", "--untracked-files=no")),
        "untracked": _lines(git(checkout, "ls-files", "-z", "--others", "--exclude-standard")),
    }


def git(checkout: Path, *arguments: str) -> bytes | None:
    """What git answers, or None where there is no git, no repository or no commit."""
    with suppress(FileNotFoundError):
        done = _run_git(checkout, *arguments)
        return done.stdout if done.returncode == 0 else None
    return None


def _complaint(checkout: Path) -> str:
    try:
        return _run_git(checkout, "ls-files", "--error-unmatch", ".").stderr.decode(errors="replace").strip()
    except FileNotFoundError:
        return "it is not on PATH"


def _run_git(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    # Not even the cache of file times in the user's index is written, for which git would lock it.
    return subprocess.run(["git", "--no-optional-locks", "-C", str(checkout), *arguments], capture_output=True)


def _lines(answer: bytes | None) -> list[str]:
    """Names that git has separated by zero bytes."""
    return [os.fsdecode(name) for name in (answer or b"").split(b"\0") if name]
