"""Who may import whom: the house's layers, and one door per outside framework."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module imports its own layer and those above it in this list. Longer names win over shorter ones.
LAYERS = [
    (
        "synthos.strict",
        "synthos.files",
        "synthos.lettering",
        "synthos.schema",
        "synthos.keys",
        "synthos.batch",
        "synthos.arguments",
    ),
    ("synthos.diffusion", "synthos.data"),
    ("synthos.models",),
    ("synthos.recipes",),
    ("synthos.train",),
    ("synthos.build",),
    ("synthos.run", "synthos.generate", "synthos"),
    ("launch",),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
STRANGERS = [("synthos.diffusion", "synthos.data")]  # of one layer, and not to see each other

DOORS = {
    "hydra": ("launch.compose",),
    "omegaconf": ("launch",),
    "submitit": ("launch.backends",),
    "wandb": ("synthos.train.report",),
    "webdataset": ("synthos.data",),
    "fsspec": ("synthos.data",),
    "pyarrow": ("synthos.data",),
    "diffusers": ("synthos.models", "synthos.diffusion.sampling"),
    "transformers": ("synthos.models",),
    "torch.distributed": ("synthos.train",),
}


def test_no_module_imports_what_stands_above_it() -> None:
    assert [problem for name, source in modules() for problem in problems(name, source)] == []


def test_the_walk_sees_the_whole_house() -> None:
    names = {name for name, _ in modules()}
    assert {"synthos", "synthos.schema", "synthos.recipes.i2i", "synthos.data.commands", "launch.compose"} <= names


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("synthos.data.stream", "from synthos.diffusion import noising"),
        ("synthos.data.stream", "import synthos.train.loop"),
        ("synthos.schema", "from synthos.models.parts import Models"),
        ("synthos.train.loop", "from synthos.recipes.i2i import I2I"),
        ("synthos.train.loop", "from synthos.recipes import i2i"),
        ("synthos.recipes.i2i", "from synthos.recipes.other import loss"),
        ("synthos.recipes.i2i", "from . import other"),
        ("synthos.train.loop", "from ..build import build_job"),
        ("synthos.run", "import launch.compose"),
        ("synthos.run", "def main():\n    if True:\n        from launch.compose import compose"),
        ("synthos.models.wan", "def f():\n    import webdataset"),
        ("synthos.recipes.i2i", "from diffusers import AutoencoderKLWan"),
        ("synthos.diffusion.noising", "import diffusers.schedulers"),
        ("synthos.build", "import torch.distributed as dist"),
        ("synthos.build", "from torch import distributed"),
        ("synthos.build", "import torch\ndef f():\n    torch.distributed.barrier()"),
        ("synthos.build", "import importlib\nimportlib.import_module('wandb')"),
        ("synthos.schema", "from omegaconf import OmegaConf"),
        ("launch.plan", "from hydra import compose"),
        ("launch.agent", "import submitit"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert problems(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("synthos.data.stream", "from synthos.data.plan import Plan\nimport webdataset"),
        ("synthos.train.loop", "from synthos.recipes.base import Recipe\nimport torch.distributed"),
        ("synthos.recipes.i2i", "from synthos.recipes.base import Loss\nfrom synthos.data.decode import decode_image"),
        ("synthos.diffusion.sampling", "def f():\n    from diffusers import UniPCMultistepScheduler"),
        ("launch.commands.submit", "import synthos.run\nfrom launch.compose import compose"),
        ("launch.compose", "import hydra"),
    ],
)
def test_a_right_import_is_let_through(module: str, source: str) -> None:
    assert problems(module, source) == []


def modules() -> Iterator[tuple[str, str]]:
    """Every module of the two packages, with its source."""
    for package in ("synthos", "launch"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path.read_text()


def problems(module: str, source: str) -> list[str]:
    """A line for each import, at any depth, that the module may not make."""
    found = []
    for line, imported in imports(module, source):
        fault = layer_fault(module, imported) or door_fault(module, imported)
        if fault:
            found.append(f"{module}:{line} imports {imported}: {fault}")
    return found


def imports(module: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported; `from a import b` counts as a.b, since b may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: none of the packages' __init__ files uses it, so the module is a file
                base = ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) == ("torch", "distributed"):
                yield node.lineno, "torch.distributed"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((node.lineno, a.value) for a in node.args if isinstance(a, ast.Constant))


def layer_fault(module: str, imported: str) -> str:
    mine, its = layer(module), layer(imported)
    if not its:
        return ""
    if RANK[its] > RANK[mine]:
        return f"{its} stands above {mine}"
    if (mine, its) in STRANGERS or (its, mine) in STRANGERS:
        return f"{mine} and {its} do not see each other"
    concrete = its == "synthos.recipes" and not within(imported, "synthos.recipes.base") and imported != module
    if concrete and mine in ("synthos.train", "synthos.recipes"):
        return "only synthos.recipes.base may be imported here"
    return ""


def door_fault(module: str, imported: str) -> str:
    for framework, doors in DOORS.items():
        if within(imported, framework) and not any(within(module, door) for door in doors):
            return f"{framework} enters by {' and '.join(doors)} only"
    return ""


def layer(name: str) -> str:
    """The layer's name that `name` belongs to, or "" for what is not ours."""
    return max((known for known in RANK if within(name, known)), key=len, default="")


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")
