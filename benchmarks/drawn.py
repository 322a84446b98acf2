"""A training job without files: the product's own, with weights, pictures and captions that are made up."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.flops import Tokens, autoencoder_flops, image_encoder_flops, text_encoder_flops, transformer_flops
from synthos.batch import Batch, Fault, Features
from synthos.build import build_recipe, build_state, fill_frozen
from synthos.keys import hash64, signed64
from synthos.models.parts import Models
from synthos.models.tensors import Tensors
from synthos.models.text import load_tokenizer
from synthos.recipes.base import Encoded, Recipe
from synthos.schema import BatchConfig, ModelConfig, RunConfig
from synthos.train.checkpoint import Checkpoints
from synthos.train.distributed import World, set_training
from synthos.train.loop import Job
from synthos.train.report import Report
from synthos.train.stop import Stop
from synthos.train.validate import Validator, encode_all

Columns = dict[str, Tensor | list[str]]


@dataclass
class DrawnModels(Models):
    """Parts built from their configs alone, whose tensors are drawn on `device` when they are filled."""

    device: torch.device = torch.device("cpu")

    def tensors(self, module: nn.Module) -> Tensors:
        return {name: partial(self._draw, name, parameter.shape) for name, parameter in module.named_parameters()}

    def _draw(self, name: str, shape: torch.Size) -> Tensor:
        """Gains of one and biases of zero; else normal, of a variance that keeps what passes through in range."""
        if len(shape) < 2:
            return torch.full(shape, float(name.endswith("weight")), device=self.device)
        generator = torch.Generator(self.device).manual_seed(signed64(hash64(name)))
        drawn = torch.randn(shape, generator=generator, device=self.device)
        return drawn.mul_((shape[0] / shape.numel()) ** 0.5)


class Endless:
    """The loop's stream with nothing to wait for: the same columns for ever, under new sample ids."""

    def __init__(self, size: int, columns: Columns) -> None:
        self.ids, self.columns, self.cursor = torch.arange(size), columns, 0

    def __len__(self) -> int:
        return len(self.ids)

    def next(self) -> Batch:
        self.cursor += len(self)
        return Batch(self.ids + self.cursor, torch.zeros_like(self.ids), self.columns)

    def batch(self, rows: list[int]) -> Batch:
        whole = Batch(self.ids, torch.zeros_like(self.ids), self.columns)
        return whole.slice(min(rows), max(rows) + 1)

    def digest(self) -> str:
        return f"up to {self.cursor}"

    def count(self, faults: Sequence[Fault]) -> None:
        assert not faults, "what is made up is never bad"

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cursor = state["cursor"]

    def close(self) -> None:
        self.columns = {}


def build_job(config: RunConfig, world: World, folder: Path, online: bool) -> Job:
    """Everything an update needs, as `synthos.build` wires it.

    Args:
        config: batch sizes apart, what is trained and how.
        world: of one rank.
        folder: an empty one, for the trace of samples.
        online: the encoders run in every step; else features are looked up and the encoders are gone.
    """
    models = DrawnModels(config.model, Path(config.cache_dir), meta_only=True, device=world.device)
    recipe: Any = build_recipe(config.recipe, models)
    # Only its speed differs from the real one's: captions are cut to the same number of tokens.
    recipe.tokenizer = load_tokenizer(Models(ModelConfig("tiny"), Path(config.cache_dir)))
    recipe.compute_dtype = world.dtype
    fill_frozen(recipe, models, world.device, world.dtype)
    null = recipe.null()
    stream = Endless(1, _columns(config, 1, world.device))
    if not online:
        recipe.encode = from_memory(recipe, encode_all(recipe, stream.next().to(world.device)))
        recipe.encoders = nn.ModuleDict()
    state = build_state(config, recipe, models, world)
    set_training(recipe.network, True)
    report = Report(folder, config, world, attempt=1)
    report.trace_file = (folder / "trace.bin").open("ab", buffering=0)  # all that an update tells it
    return Job(
        config=config,
        world=world,
        recipe=recipe,
        state=state,
        stream=stream,
        null=null,
        validator=Validator(recipe, world, stream, Encoded({}, {}, []), null, micro=1, samples=1, seed=0),
        checkpoints=Checkpoints(folder / "checkpoints", world, keep_last=1, keep_best=0),
        report=report,
        stop=Stop(folder / "stop", world),
        export=lambda state: folder,
        last_step=config.optim.steps or 1,
    )


def with_batch(job: Job, size: int) -> Job:
    """The same job with updates of `size` images, all of them in one forward pass."""
    config = replace(job.config, batch=BatchConfig(size=size, micro=size))
    read = _columns(config, size, job.world.device) if job.recipe.encoders else {}  # nobody decodes what is looked up
    state = replace(job.state, batch_size=size, images_seen=0)
    return replace(job, config=config, stream=Endless(size, read), state=state)


def step_flops(job: Job) -> dict[str, float]:
    """Operations of one update per image, by what they are spent on; encoders as far as the job has them."""
    recipe, data = job.recipe, job.config.data
    text, image = job.null["text"], job.null["image"]  # [1, N, D]
    patches = data.height // recipe.size_multiple * (data.width // recipe.size_multiple)
    settings: Any = recipe.network.config
    step = transformer_flops(
        settings,
        Tokens(patches, text.shape[1], image.shape[1]),
        image.shape[2],
        job.config.recipe["train"],
        recompute=job.config.activation_checkpointing,
    )
    counts = {"forward": step.forward, "backward": step.backward, "recompute": step.recompute}
    if recipe.encoders:
        tower: Any = recipe.encoders["image"]
        vae: Any = recipe.frozen["vae"]
        counts["text_encoder"] = text_encoder_flops(recipe.encoders["text"].config, text.shape[1])
        counts["image_encoder"] = image_encoder_flops(tower.config, len(tower.encoder.layers))
        counts["autoencoder"] = autoencoder_flops(type(vae).__name__, vae.config, data.height, data.width)
    return counts


def _columns(config: RunConfig, size: int, device: torch.device) -> Columns:
    """Random pictures, uint8 [size, 3, H, W], pinned for a GPU; captions beyond the text length."""
    images = torch.randint(256, (size, 3, config.data.height, config.data.width), dtype=torch.uint8)
    captions = [f"picture {row}" + " and more" * config.recipe["text_length"] for row in range(size)]
    return {"image": images.pin_memory() if device.type == "cuda" else images, "text": captions}


def from_memory(recipe: Recipe, features: Features) -> Callable[[Batch, str], Features]:
    """`recipe.encode` as a look-up; every sample has the features of the one that was encoded."""

    def encode(batch: Batch, group: str) -> Features:
        names = [name for name, feature in recipe.features.items() if feature.group == group]
        return {name: features[name].expand(len(batch), *features[name].shape[1:]).contiguous() for name in names}

    return encode
