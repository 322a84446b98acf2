"""The one strict conversion between plain YAML values and dataclasses: nothing is guessed and nothing is ignored."""

import dataclasses
import difflib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's: some ten times faster with thousands of requests
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def load(cls: type[T], mapping: Mapping[str, Any], path: str = "") -> T:
    """Convert `mapping` to the dataclass `cls`.

    Raises ValueError naming every wrong key at once: unknown (with the nearest known one), missing, or of the wrong
    type, each with its config path, its value and what is allowed.
    """
    errors: list[str] = []
    value = _dataclass(cls, mapping, path, errors)
    if errors:
        raise ValueError("\n".join(errors))
    return value  # type: ignore[no-any-return]


def read_config(cls: type[T], path: Path) -> T:
    """The frozen config of a run folder."""
    return load(cls, read_yaml(path))


def read_yaml(path: Path) -> Any:
    """The plain values of a YAML file; YAMLError for what is none."""
    return yaml.load(path.read_text(), LOADER)


def write_config(value: Any, path: Path) -> None:
    """Freeze a config: plain YAML that `read_config` turns back into the same dataclass."""
    path.write_text(yaml.dump(dump(value), Dumper=DUMPER, sort_keys=False, allow_unicode=True))


def dump(value: Any) -> Any:
    """The plain dicts and lists that `load` turns back into the same dataclass."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: dump(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: dump(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [dump(v) for v in value]
    return value


def unknown(key: str, allowed: list[str]) -> str:
    """`did you mean` and the list of what is allowed: the second half of every unknown-name message."""
    near = difflib.get_close_matches(key, allowed, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}allowed: {', '.join(sorted(allowed))}"


def _dataclass(cls: Any, mapping: Any, path: str, errors: list[str]) -> Any:
    if not isinstance(mapping, Mapping):
        errors.append(f"{path or 'config'}: {mapping!r} is not a group of keys")
        return None
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in mapping:
        if key not in fields:
            errors.append(f"{_join(path, str(key))}: unknown key; {unknown(str(key), list(fields))}")
    values = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _value(hints[name], mapping[name], _join(path, name), errors)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            errors.append(f"{_join(path, name)}: missing; expected {_describe(hints[name])}")
    return None if errors else cls(**values)


def _value(hint: Any, value: Any, path: str, errors: list[str]) -> Any:
    """`value` as the type `hint`, or an entry in `errors`."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _union(args, value, path, errors)
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, path, errors)
    if origin is Literal and value in args:
        return value
    if origin is dict and isinstance(value, Mapping):
        return {str(k): _value(args[1], v, _join(path, str(k)), errors) for k, v in value.items()}
    if origin is list and isinstance(value, list | tuple):
        return [_value(args[0], v, f"{path}[{i}]", errors) for i, v in enumerate(value)]
    if origin is tuple and isinstance(value, list | tuple) and (args[-1] is ... or len(value) == len(args)):
        kinds = [args[0]] * len(value) if args[-1] is ... else args
        return tuple(_value(k, v, f"{path}[{i}]", errors) for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    errors.append(f"{path}: {value!r} is not allowed; expected {_describe(hint)}")
    return None


def _union(args: tuple[Any, ...], value: Any, path: str, errors: list[str]) -> Any:
    if value is None and type(None) in args:
        return None
    attempts = []
    for hint in (a for a in args if a is not type(None)):
        tried: list[str] = []
        result = _value(hint, value, path, tried)
        if not tried:
            return result
        attempts.append(tried)
    deepest = [a for a in attempts if not a[0].startswith(f"{path}: ")]
    errors.extend(deepest[0] if deepest else [f"{path}: {value!r} is not allowed; expected {_describe(args)}"])
    return None


def _describe(hint: Any) -> str:
    """A type in words a user can act on."""
    if isinstance(hint, tuple) or get_origin(hint) in (Union, types.UnionType):
        args = hint if isinstance(hint, tuple) else get_args(hint)
        return " or ".join(_describe(a) for a in args)
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(a) for a in get_args(hint))
    if get_origin(hint) is tuple:
        return "(" + ", ".join("..." if a is ... else _describe(a) for a in get_args(hint)) + ")"
    if get_origin(hint) in (list, dict):
        return f"{'list' if get_origin(hint) is list else 'mapping'} of {_describe(get_args(hint)[-1])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
