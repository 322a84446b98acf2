"""The copy of the code that a run starts from, against git's own idea of the same files."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from launch import snapshot
from launch.attempts import newest_record
from launch.compose import CHECKOUT, compose
from synthos.run import main, read_verdict
from synthos.strict import write_config
from tests.launch.conftest import git, tree
from tests.support import environment

AUTHOR = ("-c", "user.name=a", "-c", "user.email=a@b")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Everything that a working tree can hold: changed, deleted, unknown and ignored files, a link, a script."""
    folder = tmp_path / "checkout"
    files = {
        "synthos/__init__.py": "first\n", "synthos/a/deep.py": "1\n", "synthos/a.b": "sorts before a/\n",
        "launch/gone.py": "", "run.sh": "#!/bin/sh\n", "café menu.txt": "x", ".gitignore": "*.log\n/data/\n",
    }  # fmt: skip
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "run.sh").chmod(0o755)
    (folder / "link").symlink_to("run.sh")
    git(folder, "init", "-q", "-b", "topic")
    git(folder, "add", ".")
    git(folder, *AUTHOR, "commit", "-qm", "first")
    (folder / "synthos" / "__init__.py").write_text("second\n")
    (folder / "launch" / "gone.py").unlink()
    (folder / "staged.py").write_text("staged\n")
    git(folder, "add", "staged.py")
    (folder / "synthos" / "unknown.py").write_text("unknown\n")
    (folder / "noise.log").write_text("ignored")
    (folder / "data").mkdir()
    (folder / "data" / "big.tar").write_text("ignored")
    return folder


def git_tree(folder: Path, work: Path) -> str:
    """The name that git itself gives the working tree, by an index of its own."""
    work.mkdir()
    own = {**os.environ, "GIT_INDEX_FILE": str(work / "index")}
    for command in (["add", "-A"], ["write-tree"]):
        done = subprocess.run(["git", "-C", str(folder), *command], env=own, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}


def test_the_copy_is_the_working_tree_and_has_gits_name(repository: Path, tmp_path: Path) -> None:
    before = tree(repository)
    kept = snapshot.take(repository, tmp_path / "runs" / ".code")
    assert tree(repository) == before  # neither git's index nor its objects, nor any file, was touched
    assert kept.name == git_tree(repository, tmp_path / "git")
    assert listing(kept) == {
        "synthos/__init__.py", "synthos/a/deep.py", "synthos/a.b", "synthos/unknown.py", "run.sh", "café menu.txt",
        ".gitignore", "link", "staged.py",
    }  # fmt: skip
    assert (kept / "synthos" / "__init__.py").read_text() == "second\n"
    assert os.readlink(kept / "link") == "run.sh" and os.access(kept / "run.sh", os.X_OK)
    assert not os.access(kept / "staged.py", os.X_OK)
    modes = [path.lstat().st_mode for path in (kept, *kept.rglob("*")) if not path.is_symlink()]
    assert not [mode for mode in modes if mode & 0o222]
    assert [path.name for path in kept.parent.iterdir() if path.name.startswith(".")] == []


def test_a_copy_is_made_once_and_never_written_to(repository: Path, tmp_path: Path) -> None:
    store = tmp_path / ".code"
    first = snapshot.take(repository, store)
    before = tree(*first.iterdir())  # its own time is that of the last take
    assert snapshot.take(repository, store) == first
    (repository / "staged.py").write_text("later\n")
    (repository / "synthos" / "unknown.py").unlink()
    (repository / "synthos" / "new.py").touch()
    second = snapshot.take(repository, store)
    assert tree(*first.iterdir()) == before and second != first
    assert (second / "staged.py").read_text() == "later\n"
    assert listing(second) ^ listing(first) == {"synthos/unknown.py", "synthos/new.py"}
    snapshot.remove(first)
    assert sorted(path.name for path in store.iterdir()) == sorted([second.name, f"{second.name}.json"])


def test_many_copies_at_the_same_time_are_one(repository: Path, tmp_path: Path) -> None:
    store = tmp_path / ".code"
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("fork")) as pool:
        kept = set(pool.map(snapshot.take, [repository] * 16, [store] * 16))
    (only,) = kept
    assert snapshot.tree_of(only, sorted(listing(only))) == only.name
    assert sorted(path.name for path in store.iterdir()) == [only.name, f"{only.name}.json"]


def test_a_copy_of_a_copy_is_the_same(repository: Path, tmp_path: Path) -> None:
    """A job that submits another one does so from its own code, which no git knows."""
    first = snapshot.take(repository, tmp_path / ".code")
    (first.parents[1] / "__pycache__").mkdir()
    assert snapshot.take(first, tmp_path / ".code") == first
    second = snapshot.take(first, tmp_path / "elsewhere" / ".code")
    assert second.name == first.name and listing(second) == listing(first)
    assert snapshot.facts(second) == snapshot.git_facts(repository)


def test_a_repository_within_the_repository_is_copied_too(repository: Path, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    git(inner, "init", "-q")
    (inner / "part.py").write_text("part\n")
    git(inner, "add", ".")
    git(inner, *AUTHOR, "commit", "-qm", "part")
    git(repository, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(inner), "vendor/inner")
    (repository / "vendor" / "inner" / "part.py").write_text("changed\n")
    shutil.copytree(inner, repository / "clone")
    kept = snapshot.take(repository, tmp_path / ".code")
    assert (kept / "vendor" / "inner" / "part.py").read_text() == "changed\n"
    assert (kept / "clone" / "part.py").read_text() == "part\n"
    assert not [name for name in listing(kept) if ".git/" in name or name.endswith("/.git/HEAD")]


def test_a_folder_of_a_larger_repository(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    shutil.copytree(repository, folder / "sub", symlinks=True, ignore=shutil.ignore_patterns(".git", "gone.py"))
    (folder / "other.py").touch()
    git(folder, "init", "-q")
    kept = snapshot.take(folder / "sub", tmp_path / ".code")
    assert kept.name == snapshot.take(repository, tmp_path / ".code").name


def test_outside_of_git_only_the_packages_are_copied(repository: Path, tmp_path: Path) -> None:
    shutil.rmtree(repository / ".git")
    (repository / "synthos" / "__pycache__").mkdir()
    (repository / "synthos" / "__pycache__" / "a.pyc").touch()
    kept = snapshot.take(repository, tmp_path / ".code")
    assert {name.split("/")[0] for name in listing(kept)} == {"synthos"}
    assert listing(kept) == {f"synthos/{name}" for name in ("__init__.py", "a/deep.py", "a.b", "unknown.py")}
    assert [*snapshot.problems(repository)] == []


def test_what_should_not_be_copied_is_named(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [*snapshot.problems(repository)] == []
    with (repository / "weights.bin").open("wb") as file:
        file.truncate(6_000_000)
    (repository / ".env").touch()
    monkeypatch.setenv("SOME_PASSWORD", "planted-a2ef")
    (repository / "synthos" / "__init__.py").write_text("login('planted-a2ef')")
    found = dict(line.removeprefix("code: ").split(" ", 1) for line in snapshot.problems(repository))
    assert found["weights.bin"].startswith("has 6 MB, at most 5 are allowed; ") and ".gitignore" in found["weights.bin"]
    assert found[".env"].startswith("is a file for secrets by its name; ")
    assert found["synthos/__init__.py"].startswith("holds the value of $SOME_PASSWORD, ") and len(found) == 3
    git(repository, "add", "weights.bin")  # git knows it now: it was chosen
    monkeypatch.setattr(snapshot, "TOTAL_MB", 5.5)
    (line,) = [line for line in snapshot.problems(repository) if "the files have" in line]
    assert line.startswith("code: the files have 6 MB, at most 5.5 are allowed: weights.bin 6 MB, ")


def test_folders_of_runs_are_no_code_though_git_does_not_ignore_them(repository: Path, tmp_path: Path) -> None:
    runs = repository / "out"
    (runs / "x").mkdir(parents=True)
    with (runs / "x" / "checkpoint").open("wb") as file:
        file.truncate(6_000_000)
    assert [*snapshot.problems(repository, [runs])] == []
    assert "out" not in {path.name for path in snapshot.take(repository, tmp_path / ".code", [runs]).iterdir()}


def test_a_git_that_does_not_answer_is_no_missing_git(repository: Path, tmp_path: Path) -> None:
    shutil.rmtree(repository / ".git")
    (repository / ".git").write_text("gitdir: /nowhere\n")
    (line,) = snapshot.problems(repository)
    assert line.startswith(f"code: git can't list the files of {repository}: fatal: not a git repository: /nowhere")
    with pytest.raises(RuntimeError, match="git can't list the files"):
        snapshot.take(repository, tmp_path / ".code")


def test_a_store_that_cannot_be_written(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match=r"the code can't be copied to .*/file/\.code: Not a directory"):
        snapshot.take(repository, tmp_path / "file" / ".code")


def test_a_process_that_imported_other_code_is_told(repository: Path, tmp_path: Path) -> None:
    run = tmp_path / "group" / "run"
    run.mkdir(parents=True)
    with pytest.raises(ValueError, match="code does not lead to a copy of the code; submit the run again"):
        snapshot.check_imported(run)
    kept = snapshot.take(repository, tmp_path / ".code")
    snapshot.link(run, kept)
    assert os.readlink(run / "code") == f"../../.code/{kept.name}" and snapshot.tree_name(run) == kept.name
    with pytest.raises(ValueError, match=f"the code of this run is {kept}, but this process has imported {CHECKOUT}"):
        snapshot.check_imported(run)


def test_a_rank_that_imported_other_code_does_not_run(repository: Path, tmp_path: Path) -> None:
    run = tmp_path / "group" / "run"
    run.mkdir(parents=True)
    config = compose(["recipe=i2i", "model=tiny", "data=photos", "cluster=local", f"runs_dir={tmp_path}"]).config
    write_config(config, run / "config.yaml")
    snapshot.link(run, snapshot.take(repository, tmp_path / ".code"))
    with pytest.raises(RuntimeError, match=r"the code of this run is .*, but this rank has imported .*/synthos/run.py"):
        main(run, 1)
    assert read_verdict(run)["status"] == "failed"


@pytest.mark.slow
def test_a_job_that_submits_does_so_into_the_same_runs(arguments: list[str], tmp_path: Path) -> None:
    kept = snapshot.take(CHECKOUT, tmp_path / "runs" / ".code")
    own = [argument for argument in arguments if not argument.startswith(("runs_dir=", "cache_dir="))]
    command = [sys.executable, str(kept / "launch" / "submit.py"), *own, "dry_run=true"]
    done = subprocess.run(command, cwd=kept, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and f"run folder: {tmp_path / 'runs' / 'i2i'}/i2i-" in done.stdout, done.stderr
    unset = {name: value for name, value in environment().items() if name != "SYNTHOS_RUNS"}
    command = [sys.executable, "-m", "launch.cli", "status"]
    done = subprocess.run(command, cwd=kept, env=unset, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"no runs to show in {tmp_path / 'runs'}\n", done.stderr


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """This checkout in another place, as a repository of its own, with a change that git does not know yet."""
    kept = snapshot.take(CHECKOUT, tmp_path / "original")
    folder = tmp_path / "clone"
    shutil.copytree(kept, folder, symlinks=True)
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, *AUTHOR, "commit", "-qm", "clone")
    with (folder / "synthos" / "train" / "loop.py").open("a") as file:
        file.write("\nfrom synthos.unknown import MARK\n\nprint(MARK)\n")
    (folder / "synthos" / "unknown.py").write_text('MARK = "of the old tree"\n')
    return folder


# What `synthos submit` does, with a change of the checkout between the opening of the folder and the start.
EDITED = """
import shutil, sys
from pathlib import Path
from launch import backends
from launch.commands.submit import make_plan
from launch.compose import CHECKOUT, compose
from launch.rundir import hold, open_folder

config = make_plan(compose(sys.argv[1:]).config, False)
with hold(config.folder) as lock:
    open_folder(config.folder, config.config, sys.argv, CHECKOUT)
    (CHECKOUT / "synthos" / "unknown.py").write_text('MARK = "of the new tree"')
    shutil.rmtree(CHECKOUT / "synthos" / "diffusion")
    (CHECKOUT / "synthos" / "train" / "torch.py").write_text("raise ImportError")
    sys.exit(backends.start(config.config, config.folder, lock))
"""


@pytest.mark.slow
def test_a_run_is_of_the_code_it_was_submitted_with(arguments: list[str], clone: Path, tmp_path: Path) -> None:
    expected = git_tree(clone, tmp_path / "git")
    local = [argument for argument in arguments if argument != "cluster=debug"]
    command = [sys.executable, "-c", EDITED, *local, "cluster=local", "cluster.threads=1"]
    done = subprocess.run(command, cwd=clone, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "of the old tree" in done.stdout and "of the new tree" not in done.stdout
    (folder,) = (tmp_path / "runs" / "i2i").iterdir()
    record = newest_record(folder)
    assert (record["status"], record["tree"]) == ("done", expected) and (folder / "code").resolve().name == expected
    code = json.loads((folder / "provenance" / "git.json").read_text())
    assert (code["tree"], code["runs"], code["untracked"]) == (expected, "copy", ["synthos/unknown.py"])
