"""What a run remembers of each submission, and that no secret is in anything that is written."""

import hashlib
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch import provenance
from launch.compose import CHECKOUT, compose
from launch.redact import problems, redact
from launch.rundir import hold, open_folder, run_folder
from launch.snapshot import git_facts
from synthos.strict import dump
from tests.launch.conftest import Submit, git
from tests.support import environment

PLANTED = "planted" + "-9c41e7d2"  # whole in no file: code that holds it would be refused


def opened(tmp_path: Path, checkout: Path, *overrides: str, command: str = "name=two words") -> Path:
    made = compose(["recipe=i2i", "model=tiny", "data=photos", f"runs_dir={tmp_path / 'runs'}", *overrides]).config
    folder = run_folder(made, "1a2b3c4d")
    with hold(folder):
        open_folder(folder, made, ["synthos", "submit", command], checkout, provenance.inputs_of(made, "f00d"))
    return folder


def test_provenance_says_what_ran(tmp_path: Path, checkout: Path) -> None:
    folder = opened(tmp_path, checkout)
    kept = folder / "provenance"
    assert (kept / "command.txt").read_text() == "synthos submit 'name=two words'\n"
    code = json.loads((kept / "git.json").read_text())
    assert code == {
        "commit": git(checkout, "rev-parse", "HEAD"), "branch": "topic", "changed": True,
        "untracked": ["extra.py"], "tree": (folder / "code").resolve().name, "runs": "copy",
    }  # fmt: skip
    patch = (kept / "changes.patch").read_text()
    assert "-old\n+new\n" in patch
    git(checkout, "checkout", "-q", "code.py")
    git(checkout, "apply", str(kept / "changes.patch"))
    assert (checkout / "code.py").read_text() == "new\n"
    packages = (kept / "packages.txt").read_text().splitlines()
    assert any(line.startswith("torch==2.") for line in packages) and packages == sorted(packages, key=str.lower)
    machine = json.loads((kept / "environment.json").read_text())
    assert (machine["python"], machine["torch"]) == (platform.python_version(), torch.__version__)
    assert machine["packages_sha256"] == hashlib.sha256((kept / "packages.txt").read_bytes()).hexdigest()
    inputs = json.loads((kept / "inputs.json").read_text())
    assert inputs["data"] == "f00d" and inputs["model"] == "tiny"


def test_a_binary_change_comes_back_whole(tmp_path: Path, checkout: Path) -> None:
    (checkout / "code.py").write_bytes(bytes(range(256)))
    kept = opened(tmp_path, checkout) / "provenance"
    git(checkout, "checkout", "-q", "code.py")
    git(checkout, "apply", str(kept / "changes.patch"))
    assert (checkout / "code.py").read_bytes() == bytes(range(256))


def test_a_new_submission_brings_its_code_and_keeps_what_the_earlier_said(
    tmp_path: Path, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = opened(tmp_path, checkout)
    kept, first = folder / "provenance", (folder / "code").resolve()
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    opened(tmp_path, checkout)  # the same in every respect
    assert sorted(path.name for path in kept.iterdir()) == sorted(before) and capsys.readouterr().out == ""
    (checkout / "code.py").write_text("newest\n")
    opened(tmp_path, checkout)
    second = (folder / "code").resolve()
    assert f"code: {second.name[:12]} from now on, was {first.name[:12]}; " in capsys.readouterr().out
    assert json.loads((kept / "git.json").read_text())["tree"] == second.name
    assert {path.name: path.read_bytes() for path in (kept / "earlier" / "0001").iterdir()} == before
    opened(tmp_path, checkout, command="nodes=2")
    assert sorted(path.name for path in (kept / "earlier").iterdir()) == ["0001", "0002"]
    assert "nodes=2" in (kept / "command.txt").read_text()
    assert (first / "code.py").read_text() == "new\n"


def test_debug_runs_the_checkout_and_says_so(tmp_path: Path, checkout: Path) -> None:
    folder = opened(tmp_path, checkout)
    opened(tmp_path, checkout, "cluster=debug")
    code = json.loads((folder / "provenance" / "git.json").read_text())
    assert (code["tree"], code["runs"]) == ("", "checkout") and not (folder / "code").exists()


def test_outside_of_git_the_facts_are_empty(tmp_path: Path) -> None:
    assert git_facts(tmp_path) == {"commit": "", "branch": "", "changed": False, "untracked": []}


SHELL = {
    "WANDB_API_KEY": PLANTED,
    "SSH_KEY": "/home/ada/.ssh/id",
    "TOKENIZERS_PARALLELISM": "false",
    "MY_PASS": "short",
}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"wandb.name={PLANTED}.", "wandb.name=***."),
        ("export HF_TOKEN=abcdef", "export HF_TOKEN=***"),
        ("export DB_PASSWORD='it is secret'", "export DB_PASSWORD=***"),
        ("+cluster.sbatch={api_key: abcdef, nice: 5}", "+cluster.sbatch={api_key: ***, nice: 5}"),
        ("git clone https://ada:pw@host/x?sig=12&a=1", "git clone https://***@host/x?sig=***&a=1"),
        ("Authorization: Bearer abcdefghijklmnopqrst", "Authorization: Bearer ***"),
        ("hf_" + "a" * 30, "hf_***"),
    ],
)
def test_secrets_are_replaced(text: str, shown: str) -> None:
    assert redact(text, SHELL) == shown


@pytest.mark.parametrize(
    "text",
    [
        "recipe.text_length=77 recipe.max_token=64 keys=a,b", "export HF_TOKEN=$(cat ~/.token)",
        "export AWS_SHARED_CREDENTIALS_FILE=/home/ada/.aws/credentials", "export TOKENIZERS_PARALLELISM=false",
        "a short passage, a key: blue", "s3://bucket/a?b=c", "short", "data.shards=/data/token/00000.tar",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text, SHELL) == text


def test_no_shipped_config_is_taken_for_a_secret() -> None:
    for recipe in ("i2i", "siglip_projector", "decomposer"):
        for cluster in ("slurm", "practice", "local"):
            config = compose([f"recipe={recipe}", "model=tiny", "data=photos", f"cluster={cluster}", "nodes=1"]).config
            assert [*problems(dump(config))] == []


def test_a_config_with_a_secret_is_refused_by_name(
    submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", PLANTED)
    setup = "cluster.setup=['export HF_TOKEN=abcdef']"
    assert submit("cluster=slurm", f"wandb.tags=[a,{PLANTED}]", setup, "+cluster.sbatch={password: abcdef}") == 2
    err = capsys.readouterr().err
    assert "wandb.tags[1]: '***' holds a secret, and a config is kept; " in err and PLANTED not in err
    assert "cluster.setup[0]: 'export HF_TOKEN=***' holds a secret" in err
    assert "cluster.sbatch.password: '***' holds a secret" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_planted_secret_is_found_nowhere(arguments: list[str], tmp_path: Path) -> None:
    """A real run with W&B: in the shell, and in an override that a later one replaces."""
    replaced = ("cluster=debug", "wandb.mode=off")
    kept = [argument for argument in arguments if argument not in replaced]
    secrets = {"WANDB_API_KEY": PLANTED * 3, "SOME_SECRET": PLANTED, "DB_PASSWORD": PLANTED}
    command = [
        *(sys.executable, str(CHECKOUT / "launch" / "submit.py"), *kept, "cluster=local", "cluster.threads=1"),
        *(f"wandb.name={PLANTED}", "wandb.name=plain", "wandb.mode=offline"),
    ]
    own = {**environment(), **secrets}
    done = subprocess.run(command, cwd="/", env=own, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    (said,) = [path for path in files if path.name == "command.txt"]
    assert "wandb.name=***" in said.read_text() and "wandb.name=plain" in said.read_text()
    assert any(path.parent.parent.name == ".code" for path in files) and any("wandb" in path.parts for path in files)
    assert [path for path in files if PLANTED.encode() in path.read_bytes()] == []
    assert PLANTED not in done.stdout + done.stderr
