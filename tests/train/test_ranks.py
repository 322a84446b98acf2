"""Four gloo ranks, laid out in every way: what they load, hold, change and write, and what the memory model says."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from synthos.build import build_recipe, measure
from synthos.models.parts import Models
from synthos.recipes.base import Recipe
from synthos.schema import RunConfig
from synthos.train.memory import Mode, checkpoint_bytes, export_bytes, rank_memory, staged_bytes
from tests.data.make import data_set
from tests.support import ROOT, SMALL, compose_for_test, environment

pytestmark = [pytest.mark.slow, pytest.mark.long]
RANKS = 4
LAYOUTS: dict[str, tuple[Mode, Mode]] = {  # of network and encoders
    "replicate": ("replicate", "replicate"),
    "hybrid": ("hybrid", "full"),
    "full": ("full", "full"),
    "full_network": ("full", "replicate"),
}
ORDINARY = ("replicate", "hybrid", "full")
KINDS = {
    "projector": ("precision=bf16", "recipe.train=projector", "recipe.drop_image=0"),
    "attention": ("precision=bf16", "recipe.train=image_attention", "recipe.attention=decoupled",
                  "recipe.text_length=512", "recipe.drop_image=0", "ema.decay=null"),
    "full": ("precision=fp32", "recipe.train=full"),
}  # fmt: skip


class Ran:
    """What the ranks of one run left behind."""

    def __init__(self, folder: Path, overrides: list[str]) -> None:
        self.folder = folder
        self.config: RunConfig = compose_for_test(*overrides)
        told = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]
        self.ranks: list[dict[str, Any]] = told

    @property
    def layout(self) -> tuple[Mode, Mode]:
        return LAYOUTS[self.folder.name.partition("-")[2]]

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def built(self) -> tuple[Recipe, Models]:
        """The same recipe in this process, on the meta device, with its tensors to read."""
        models = Models(self.config.model, Path(self.config.cache_dir), seed=self.config.seed)
        return build_recipe(self.config.recipe, models), models

    def size(self, pattern: str) -> int:
        return sum(path.stat().st_size for path in self.folder.glob(pattern))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """Every run, made one after the other by the same four processes."""
    folder = tmp_path_factory.mktemp("ranks")
    shards = data_set(folder / "shards", 60, 20)
    base = [*SMALL, "nodes=2", "gpus_per_node=2", "batch={size: 16, micro: 2}", "validate.samples=6", "optim.lr=1e-2",
            f"data.shards={shards}", "data.validation=null", "data.holdout_fraction=0.2", "data.prepare=null",
            "data.height=32", "data.width=32", f"cache_dir={folder / 'cache'}"]  # fmt: skip
    asked = {
        f"{kind}-{name}": [*base, *KINDS[kind], f"mesh={LAYOUTS[name][0]}", f"encoders={LAYOUTS[name][1]}"]
        for kind in KINDS
        for name in layouts(kind)
    }
    (folder / "runs.json").write_text(json.dumps(asked))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command = [*torchrun, "-m", "tests.train.ranks", str(folder)]
    threads = environment() | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=threads, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return {name: Ran(folder / name, overrides) for name, overrides in asked.items()}


def layouts(kind: str) -> Iterable[str]:
    return LAYOUTS if kind == "projector" else ORDINARY


EVERY = [f"{kind}-{name}" for kind in KINDS for name in layouts(kind)]


@pytest.mark.parametrize("name", EVERY)
def test_what_four_ranks_load_is_what_the_files_hold(runs: dict[str, Ran], name: str) -> None:
    """Bit for bit: trained weights in float32, the rest of the network and the encoders in the computation's dtype."""
    ran = runs[name]
    recipe, models = ran.built()
    low = torch.bfloat16 if ran.config.precision == "bf16" else torch.float32
    expected: dict[str, Tensor] = {}
    for prefix, module in {"network": recipe.network, **parts("encoders", recipe), **parts("frozen", recipe)}.items():
        for key, parameter in module.named_parameters():
            kept = parameter.requires_grad or prefix.startswith("frozen")
            expected[f"{prefix}.{key}"] = models.tensors(module)[key]().to(torch.float32 if kept else low)
    start = ran.tensors("start")
    assert start.keys() == expected.keys()
    assert [key for key in expected if not same(start[key], expected[key])] == []


def test_the_files_are_those_of_the_pretrained_folder(runs: dict[str, Ran]) -> None:
    """Read without any code of ours; the projector, which no file holds, apart."""
    cache = Path(runs["projector-full"].config.cache_dir) / "tiny"
    for part, prefix in {"transformer": "network.", "text_encoder": "encoders.text.", "vae": "frozen.vae."}.items():
        (file,) = cache.glob(f"{part}-*/*.safetensors")
        for key, value in load_file(file).items():
            found = runs["projector-full"].tensors("start")[prefix + key]
            assert same(found, value.to(found.dtype)), key


def parts(group: str, recipe: Recipe) -> dict[str, Any]:
    return {f"{group}.{name}": module for name, module in getattr(recipe, group).items()}


def same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("name", EVERY)
def test_only_what_trains_has_gradients_and_moves(runs: dict[str, Ran], name: str) -> None:
    ran = runs[name]
    low = "torch.bfloat16" if ran.config.precision == "bf16" else "torch.float32"
    for told in ran.ranks:
        assert told["with_gradient"] == told["trained"]
        assert told["masters"] == ["torch.float32"]
        assert told["dtypes"] == {"base": [low] if "full-" not in name else [], "encoders": [low],
                                  "frozen": ["torch.float32"]}  # fmt: skip
    start, end = ran.tensors("start"), ran.tensors("end")
    moved = {key for key in start if not same(start[key], end[key])}
    assert moved == {f"network.{key}" for key in ran.ranks[0]["trained"]}


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_encoders_change_no_bit(runs: dict[str, Ran], kind: str) -> None:
    """Nor does the network's mesh, but for the order in which two nodes' gradients are summed."""
    first, *others = (runs[f"{kind}-{name}"] for name in layouts(kind))
    for other in others:
        assert encoded(other) == encoded(first)
        assert other.ranks[0]["losses"][0] == first.ranks[0]["losses"][0]
        assert other.ranks[0]["losses"] == pytest.approx(first.ranks[0]["losses"], rel=1e-3)
        assert torch.allclose(grid(other), grid(first), rtol=2e-3)
    if kind == "projector":  # the same network mesh with encoders of either kind
        sharded, replicated = runs["projector-full"], runs["projector-full_network"]
        assert sharded.ranks[0]["losses"] == replicated.ranks[0]["losses"]
        assert torch.equal(grid(sharded), grid(replicated))
        ours, theirs = sharded.tensors("end"), replicated.tensors("end")
        assert all(same(ours[key], theirs[key]) for key in ours)


def encoded(ran: Ran) -> bytes:
    return (ran.folder / "requests" / "encoded.safetensors").read_bytes()


def grid(ran: Ran) -> Tensor:
    assert all(told["validation"] == ran.ranks[0]["validation"] for told in ran.ranks)
    return torch.tensor(ran.ranks[0]["validation"])


@pytest.mark.parametrize("name", EVERY)
def test_the_memory_model_is_true_to_the_byte(runs: dict[str, Ran], name: str) -> None:
    """On the fullest rank; on the others at most what their shards are smaller by."""
    ran = runs[name]
    expected = vars(rank_memory(ran.config, measure(ran.config), *ran.layout))
    for key, value in expected.items():
        held = [told["held"][key] for told in ran.ranks]
        if key != "gathered":
            assert max(held) == value, key
            assert min(held) >= 0.95 * value, key
        elif ran.layout == ("replicate", "replicate"):
            assert set(held) == {value}


@pytest.mark.parametrize("name", EVERY)
def test_the_copy_that_a_checkpoint_is_written_from_has_its_size(runs: dict[str, Ran], name: str) -> None:
    ran = runs[name]
    held = max(told["held"]["staged"] for told in ran.ranks)
    assert held == staged_bytes(ran.config, measure(ran.config), ran.layout[0])


@pytest.mark.parametrize("name", EVERY)
def test_sizes_on_disk_are_true(runs: dict[str, Ran], name: str) -> None:
    ran = runs[name]
    sizes = measure(ran.config)
    tensors = len(sizes.trained)
    margin = 2000 * tensors  # names, shapes and offsets
    checkpoint, export = checkpoint_bytes(ran.config, sizes), export_bytes(sizes)
    assert checkpoint <= ran.size("checkpoints/*/*.distcp") <= checkpoint + margin * 4 * RANKS
    assert export <= ran.size("weights/*/transformer/*.safetensors") <= export + margin
