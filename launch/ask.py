"""The command line of `synthos generate`: which of its words are keys, and the requests that the others make."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from launch.compose import file_name
from launch.requests import read_requests
from synthos.schema import GenerateConfig
from synthos.strict import unknown

COMMON = ("weights", "average", "requests", "dtype", "micro", "grid", "cache_dir", "cluster")
HERE = {  # keys that mean something in this process only, with what a job has instead
    "out": "the pictures go to samples/ of the run folder",
    "device": "expected cluster.device",
}
TRUTH = {"true": True, "false": False}
JOB = (
    "name",
    "group",
    "nodes",
    "gpus_per_node",
    "runs_dir",
    "dry_run",
    "follow",
    "after",
)  # and these with cluster= only


def split(argument: str) -> tuple[str, str]:
    """Key and value of one word of the command line."""
    key, sign, value = argument.partition("=")
    if not sign:
        raise ValueError(f"{argument!r}: expected key=value")
    return key, value


def request_fields(recipe: Any) -> list[str]:
    """The fields of a recipe's requests that the command line may set; a request's name comes from elsewhere."""
    return [field.name for field in dataclasses.fields(recipe.Request) if field.name != "name"]


def check_keys(given: Mapping[str, str], fields: list[str]) -> None:
    """Raise ValueError for a key that is unknown, and for one that means nothing here, or nothing in a job."""
    is_job = "cluster" in given
    allowed = [*fields, *COMMON, *(JOB if is_job else HERE)]
    for key in given:
        root = key.lstrip("+~").split(".")[0]
        if not is_job and (root in JOB or key != root == "cluster"):
            raise ValueError(f"{key}: has no effect without cluster=<name>, which makes a job of the generation")
        if is_job and root in HERE:
            raise ValueError(f"{key}: has no effect with cluster={given['cluster']}; {HERE[root]}")
        if root not in allowed:
            raise ValueError(f"{key}: unknown; {unknown(key, allowed)}")


def ask(config: GenerateConfig, recipe: Any, given: Mapping[str, str], name: str | None) -> list[dict[str, Any]]:
    """The requests of a command line, complete and checked.

    Without `requests=` there is one picture for each reference, or one in all; with it, what is given besides is what
    each of them leaves unsaid.

    Args:
        config: its `requests` a list, a JSONL file, or None.
        recipe: the recipe's class.
        given: the fields on the command line, as text.
        name: of the picture, if there is only one.

    Raises ValueError, in one message, for everything that is wrong with them.
    """
    references = _references(given["reference"]) if "reference" in given else []
    fields = parse_fields(recipe.Request, {k: v for k, v in given.items() if k != "reference"})
    if len(references) == 1:
        fields["reference"] = str(Path(references[0]).expanduser().absolute())
    if config.requests is None:
        several: list[dict[str, Any]] = [{"name": file_name(Path(p).stem), "reference": p} for p in references]
        one = {"name": name or (several[0]["name"] if several else "picture")}
        rows = several if len(several) > 1 else [one]
        return read_requests(rows, recipe, "request", filling=fields)
    if len(references) > 1:
        raise ValueError(f"reference: {len(references)} are not allowed with requests=; expected one, for all of them")
    requests = read_requests(config.requests, recipe, "requests", filling=fields)
    if not requests:
        raise ValueError(f"requests: {config.requests} asks for no picture")
    return requests


def parse_fields(cls: Any, given: Mapping[str, str]) -> dict[str, Any]:
    """Fields of a Request from texts: numbers where it wants numbers, `1,2` or `[1,2]` where it takes a list of them,
    true and false where it wants those, all else verbatim."""
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, text in given.items():
        kinds = {hints[key], *get_args(hints[key])}
        number = next((kind for kind in (int, float) if kind in kinds), None)
        if bool in kinds and text in TRUTH:
            values[key] = TRUTH[text]
        elif number is None:
            values[key] = text
        elif list[float] in kinds and ("," in text or text.startswith("[")):
            values[key] = [_number(key, part, float) for part in text.removeprefix("[").removesuffix("]").split(",")]
        else:
            values[key] = _number(key, text, number)
    return values


def _number(key: str, text: str, kind: type[int | float]) -> int | float:
    try:
        return kind(text)
    except ValueError:
        words = "a whole number" if kind is int else "a number"
        raise ValueError(f"{key}: {text!r} is not allowed; expected {words}") from None


def _references(text: str) -> list[str]:
    """`a.jpg`, `a.jpg,b.jpg` or `[a.jpg,b.jpg]`; a file whose name has a comma is one."""
    if Path(text).expanduser().is_file():
        return [text]
    if text.startswith('["'):
        return [str(path) for path in json.loads(text)]
    return [path.strip() for path in text.removeprefix("[").removesuffix("]").split(",") if path.strip()]
