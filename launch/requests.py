"""The pictures that are asked for: read strictly at submission, so that no job fails on them hours later."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launch.check import FILE_NAME, FILE_NAME_WORDS, size_problems
from synthos.data.decode import decode_image
from synthos.data.embedding import read_embeddings
from synthos.recipes.base import file_fields
from synthos.schema import RunConfig
from synthos.strict import load

SPLIT_PREFIX = "split_"  # of the names that `validate.from_split` gives its requests


def load_requests(config: RunConfig, recipe: Any) -> list[dict[str, Any]]:
    """`validate.requests` of a run, as `read_requests` gives them."""
    return read_requests(config.validate.requests, recipe, "validate.requests", config.validate.from_split)


def read_requests(
    asked: str | list[dict[str, Any]] | None,
    recipe: Any,
    key: str,
    from_split: int = 0,
    filling: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Requests as complete mappings of the recipe's Request, files by absolute path.

    Paths in a JSONL file are taken from its folder, others from the current one. Raises ValueError, in one message,
    naming each wrong line with what is wrong.

    Args:
        asked: a list of mappings, or a JSONL file.
        recipe: the recipe's class.
        key: of the config, for messages.
        from_split: with which names are reserved for held-out samples.
        filling: fields of every request that does not set them itself.
    """
    rows, folder = _rows(asked, key)
    problems: list[str] = []
    requests = []
    for path, row in rows:
        try:
            given = {**(filling or {}), **row} if isinstance(row, Mapping) else row
            request = _absolute_files(load(recipe.Request, given, path), folder)
        except ValueError as error:
            problems.append(str(error))
            continue
        problems += _problems(request, recipe.size_multiple, path)
        problems += _reserved(request.name, from_split, path)
        requests.append(request)
    names = [request.name for request in requests]
    repeated = sorted({name for name in names if names.count(name) > 1})
    problems += [f"{key}: the name {name!r} is used more than once" for name in repeated]
    if problems:
        raise ValueError("\n".join(problems))
    return [dataclasses.asdict(request) for request in requests]


def _rows(requests: str | list[dict[str, Any]] | None, key: str) -> tuple[list[tuple[str, Any]], Path]:
    """Each request with the name it has in messages, and the folder that relative files are in."""
    if not isinstance(requests, str):
        return [(f"{key}[{i}]", row) for i, row in enumerate(requests or [])], Path.cwd()
    file = Path(requests)
    if not file.is_file():
        raise ValueError(f"{key}: {requests} is no file; expected a list, or a JSONL file")
    lines = [(number, line) for number, line in enumerate(file.read_text().splitlines(), 1) if line.strip()]
    return [(f"{file.name}:{number}", _parse(line, file, number, key)) for number, line in lines], file.parent


def _parse(line: str, file: Path, number: int, key: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{key}: {file}, line {number} is no JSON: {error}") from None


def _absolute_files(request: Any, folder: Path) -> Any:
    files = file_fields(dataclasses.asdict(request))
    return dataclasses.replace(request, **{key: str(folder / Path(file).expanduser()) for key, file in files.items()})


def _problems(request: Any, size_multiple: int, path: str) -> list[str]:
    problems = size_problems(request, size_multiple, path)
    if not FILE_NAME.fullmatch(request.name):
        problems.append(f"{path}.name: {request.name!r} is not allowed; expected {FILE_NAME_WORDS}")
    problems += _sampling_problems(request, path)
    problems += _file_problems(request, path)
    return problems


def _file_problems(request: Any, path: str) -> Iterator[str]:
    for key, file in file_fields(dataclasses.asdict(request)).items():
        kind = "a picture" if key.startswith("reference") else "an embedding"
        try:
            if key.startswith("reference"):
                decode_image(Path(file).read_bytes(), 16, 16, "whole")  # as the recipe will, but small
            else:
                read_embeddings(Path(file))
        except (OSError, ValueError, SyntaxError) as error:
            yield f"{path}.{key}: {file} can't be read as {kind}: {error}"


def _sampling_problems(request: Any, path: str) -> Iterator[str]:
    """Of what a request may leave to its recipe: a Request need not have these fields."""
    steps = getattr(request, "steps", None)
    if steps is not None and steps < 1:
        yield f"{path}.steps: {steps} is not allowed; expected 1 or more"


def _reserved(name: str, from_split: int, path: str) -> Iterator[str]:
    if from_split and name.startswith(SPLIT_PREFIX):
        yield (
            f"{path}.name: {name!r} is not allowed with validate.from_split={from_split}, whose own names start with "
            f"{SPLIT_PREFIX!r}; expected another name, or validate.from_split=0"
        )
