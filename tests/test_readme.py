"""Every command that README and docs show is one that the product understands."""

import argparse
import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.learning import MEASURES
from launch.ask import check_keys, parse_fields, request_fields
from launch.check import value_problems
from launch.cli import VERBS, find, split_verb
from launch.commands import detailmaster
from launch.compose import choices, compose, compose_generate
from launch.points import compose_points
from synthos.recipes.base import recipe_class, recipe_config
from tests.support import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line in a bash block, continued lines joined, comments removed."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, line.split("   #")[0].strip()) for line in lines if line.strip()]
        found += [(page.name, m) for m in re.findall(r"`(python launch/submit.py [^`<]*)`", page.read_text())]
    return found


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 10


@pytest.mark.parametrize(("page", "command"), commands())
def test_command_is_understood(page: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif words[0] == ".":
        assert words[1:] == [".venv/bin/activate"]
    elif command in ("python -m venv .venv", ".venv/bin/pip install -c constraints.txt -e ."):
        assert (ROOT / "constraints.txt").is_file()  # the Makefile installs just so
    elif words[0] == "eval":
        assert words[1] == "$(slurm/practice.sh up)" and (ROOT / "slurm" / "practice.sh").is_file()
    elif words[:2] in (["python", "launch/submit.py"], ["synthos", "submit"]):
        monkeypatch.chdir(tmp_path)
        for point in compose_points([w.replace("recipe=<name>", "recipe=i2i") for w in words[2:]]):
            config = point.composed.config
            assert value_problems(config, recipe_class(config.recipe["name"]), recipe_config(config.recipe)) == []
    elif words[:4] == ["python", "-m", "benchmarks.learning", "--experiment"]:
        assert compose([f"experiment={words[4]}"]).config.recipe["name"] in MEASURES and len(words) == 5
    elif words[:3] == ["synthos", "data", "write"]:
        from synthos.data.commands.write import _parser

        given = _parser().parse_args(words[3:])
        assert given.images or given.table
    elif words[:3] == ["synthos", "requests", "detailmaster"]:
        assert detailmaster.parser().parse_args(words[3:]).dataset
    elif words[:3] == ["synthos", "data", "plan"]:
        monkeypatch.chdir(tmp_path)
        config = compose([word for word in words[3:] if word != "--json"]).config
        assert value_problems(config, recipe_class("i2i"), recipe_config(config.recipe)) == []
    elif words[:2] == ["synthos", "data"]:
        module = importlib.import_module(VERBS[f"data {words[2]}"][0].partition(":")[0])
        assert module.parser().parse_args(words[3:])
    elif words[:2] != ["synthos", "generate"]:
        understood_by_its_verb(words[1:], monkeypatch)
    else:
        given = dict(w.split("=", 1) for w in words[2:])
        folders = Path(given["weights"]).parts  # runs/<recipe or experiment>/...; or the name of a run of i2i
        group = folders[1] if len(folders) > 1 else "i2i"
        recipe = next(recipe_class(name) for name in choices()["recipe"] if group.startswith(name))
        fields = request_fields(recipe)
        check_keys(given, fields)
        assert ("out" in given) != ("cluster" in given)
        parse_fields(recipe.Request, {k: v for k, v in given.items() if k in fields})
        monkeypatch.chdir(tmp_path)
        compose_generate(given["weights"], [w for w in words[2:] if w.split("=")[0] not in (*fields, "weights")])


class Understood(Exception):
    """What a verb was given can be parsed."""


def understood_by_its_verb(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call the verb up to where it has parsed its arguments."""
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, given: list[str]) -> None:
        parse(parser, given)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    verb, rest = split_verb(words)
    with pytest.raises(Understood):
        find(verb)(rest)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_own_data_becomes_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's first own run, with a tiny model: write the data, plan on it."""
    import skimage

    from launch.cli import main

    pictures = tmp_path / "photos"
    pictures.mkdir()
    for name in ("chelsea.png", "coffee.png", "astronaut.png"):
        shutil.copy(Path(skimage.__file__).parent / "data" / name, pictures)
    table = "image,caption\nchelsea.png,a cat\ncoffee.png,a cup of coffee\nastronaut.png,an astronaut\n"
    (tmp_path / "captions.csv").write_text(table)
    out = tmp_path / "shards"
    arguments = [
        "data",
        "write",
        "--images",
        str(pictures),
        "--table",
        str(tmp_path / "captions.csv"),
        "--out",
        str(out),
    ]
    assert main(arguments) == 0
    unvalidated = ("data.holdout_fraction=0", "validate.samples=0", "validate.from_split=0", "validate.every=null")
    plan = ["submit", "recipe=i2i", "model=tiny", "data.name=mine", f"data.shards={out}", *unvalidated]
    plan += ["batch={size: 2, micro: 2}", "dry_run=true"]
    assert main(plan) == 0
    assert "3 samples to train on" in capsys.readouterr().out
