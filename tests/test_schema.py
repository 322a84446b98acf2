"""The strict conversion from plain mappings to dataclasses."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from launch.compose import LAUNCHER, Once
from synthos.schema import GenerateConfig, RunConfig
from synthos.strict import dump, load, read_config, unknown, write_config

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Inner:
    size: int
    rate: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["a", "b"]
    flag: bool
    inner: Inner
    pair: tuple[float, float] = (0.0, 1.0)
    many: tuple[int, ...] = ()
    maybe: int | None = None
    either: str | list[str] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    parts: dict[str, Inner] = field(default_factory=dict)


GOOD: dict[str, Any] = {"name": "x", "kind": "a", "flag": True, "inner": {"size": 3}}


def test_defaults_are_kept_and_nested_groups_become_dataclasses() -> None:
    assert load(Outer, GOOD) == Outer("x", "a", True, Inner(3, 0.5))


def test_every_kind_of_value_converts() -> None:
    values = {
        **GOOD,
        "pair": [1, 2.5],
        "many": [1, 2, 3],
        "maybe": 4,
        "either": ["p", "q"],
        "rows": [{"any": [1, "thing"]}],
        "parts": {"vae": {"size": 1, "rate": 2}},
    }
    loaded = load(Outer, values)
    assert loaded.pair == (1.0, 2.5) and all(type(value) is float for value in loaded.pair)
    assert loaded.many == (1, 2, 3) and loaded.maybe == 4 and loaded.either == ["p", "q"]
    assert loaded.rows == [{"any": [1, "thing"]}] and loaded.parts == {"vae": Inner(1, 2.0)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nam": "y"}, "nam: unknown key; did you mean 'name'? allowed: either, flag, inner, kind, many, maybe, name"),
        ({"inner": {"size": 3, "sizes": 1}}, "inner.sizes: unknown key; did you mean 'size'? allowed: rate, size"),
        ({"inner": {"rate": 1.0}}, "inner.size: missing; expected a whole number"),
        ({"inner": 3}, "inner: 3 is not a group of keys"),
        ({"inner": {"size": 1.0}}, "inner.size: 1.0 is not allowed; expected a whole number"),
        ({"inner": {"size": True}}, "inner.size: True is not allowed; expected a whole number"),
        ({"inner": {"size": 1, "rate": True}}, "inner.rate: True is not allowed; expected a number"),
        ({"name": 3}, "name: 3 is not allowed; expected text"),
        ({"name": None}, "name: None is not allowed; expected text"),
        ({"flag": 1}, "flag: 1 is not allowed; expected true or false"),
        ({"kind": "c"}, "kind: 'c' is not allowed; expected one of a, b"),
        ({"pair": [1]}, "pair: [1] is not allowed; expected (a number, a number)"),
        ({"pair": [1, "x"]}, "pair[1]: 'x' is not allowed; expected a number"),
        ({"many": [1, 2.5]}, "many[1]: 2.5 is not allowed; expected a whole number"),
        ({"maybe": "x"}, "maybe: 'x' is not allowed; expected a whole number or null"),
        ({"either": 3}, "either: 3 is not allowed; expected text or list of text or null"),
        ({"either": ["p", 3]}, "either[1]: 3 is not allowed; expected text"),
        ({"rows": [3]}, "rows[0]: 3 is not allowed; expected mapping of Any"),
        ({"parts": {"vae": {"size": "x"}}}, "parts.vae.size: 'x' is not allowed; expected a whole number"),
    ],
)
def test_each_fault_is_named_with_its_place_and_what_is_allowed(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        load(Outer, {**GOOD, **change})
    assert str(error.value).startswith(message)


def test_all_faults_come_in_one_message() -> None:
    with pytest.raises(ValueError) as error:
        load(Outer, {"name": 1, "kind": "z", "flag": True, "inner": {"rate": "x"}, "extra": 1})
    lines = str(error.value).splitlines()
    assert {line.split(":")[0] for line in lines} == {"name", "kind", "inner.size", "inner.rate", "extra"}


def test_the_path_of_the_caller_leads_every_message() -> None:
    with pytest.raises(ValueError, match=r"^recipe\.size: missing"):
        load(Inner, {}, "recipe")


def test_unknown_offers_the_nearest_and_lists_all() -> None:
    assert unknown("helo", ["world", "hello"]) == "did you mean 'hello'? allowed: hello, world"
    assert unknown("zzz", ["b", "a"]) == "allowed: a, b"


def test_what_is_frozen_reads_back_equal(tmp_path: Path) -> None:
    outer = load(Outer, {**GOOD, "pair": [1e-8, 1.5e300], "either": "äöü: 1e-3", "rows": [{"a": None, "b": "1e-3"}]})
    write_config(outer, tmp_path / "config.yaml")
    assert read_config(Outer, tmp_path / "config.yaml") == outer
    assert dump(outer)["inner"] == {"size": 3, "rate": 0.5}


def test_run_yaml_and_the_dataclasses_list_the_same_keys() -> None:
    root = yaml.safe_load((CONFIGS / "run.yaml").read_text())
    groups = {key for entry in root.pop("defaults") if isinstance(entry, dict) for key in entry}
    launcher_only = {*LAUNCHER, "hydra"}
    assert groups | set(root) - launcher_only == {f.name for f in dataclasses.fields(RunConfig)}
    kinds = {f.name: f.type for f in dataclasses.fields(RunConfig)}
    for name, kind in kinds.items():
        if name not in groups and dataclasses.is_dataclass(kind):
            assert set(root[name]) == {f.name for f in dataclasses.fields(kind)}, name


def test_generate_yaml_lists_the_keys_of_its_dataclasses() -> None:
    root = yaml.safe_load((CONFIGS / "generate.yaml").read_text())
    assert [entry for entry in root.pop("defaults") if entry != "_self_"] == [{"cluster": "debug"}]
    keys = {f.name for cls in (GenerateConfig, Once) for f in dataclasses.fields(cls)}
    assert {*root, "cluster"} == keys


def read_choice(file: Path) -> dict[str, Any]:
    """A choice of a group, on top of the one that it names as its default."""
    listed: dict[str, Any] = yaml.safe_load(file.read_text())
    for base in listed.pop("defaults", []):
        listed = listed if base == "_self_" else read_choice(file.with_name(f"{base}.yaml")) | listed
    return listed


@pytest.mark.parametrize("group", ["optim", "cluster", "data"])
def test_every_choice_of_a_group_lists_all_its_keys(group: str) -> None:
    kind = {f.name: f.type for f in dataclasses.fields(RunConfig)}[group]
    files = sorted((CONFIGS / group).glob("*.yaml"))
    assert files
    for file in files:
        listed, fields = read_choice(file), dataclasses.fields(kind)
        of_slurm = {f.name for f in fields if group == "cluster" and _has_default(f)}
        here = listed.get("backend") in ("debug", "local")  # where a key of Slurm's would be ignored
        assert set(listed) == {f.name for f in fields} - (of_slurm if here else set()), file.name


def _has_default(field: dataclasses.Field[object]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
