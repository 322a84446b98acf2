"""A tiny SD3 transformer that listens to its prompt: the frozen base of the experiment decomposer_photos.

    python -m benchmarks.tiny_base                     writes .cache/tiny_base-1, unless it is there

A random frozen backbone would prove nothing, so this one is trained first: the transformer of `model=tiny`, on the
photographs and captions of data=photos, by flow matching (arXiv 2210.02747) with SD3's noise levels, from the features
that the recipe `decomposer` makes with the same settings. As in SD3's training (arXiv 2403.03206) the parts of a prompt
are dropped independently, here T5's states and CLIP's, so that each comes to be read. The folder keeps the averaged
weights as diffusers reads them, and base.json: how much the velocity depends on the prompt, for held-out pictures.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measures import SPLITS
from benchmarks.measures_decomposer import measure_dependence, velocity, whole
from synthos.batch import Batch, Features
from synthos.build import build_recipe, fill_frozen
from synthos.data import photos
from synthos.data.plan import last_step
from synthos.data.stream import HeldOut, Stream
from synthos.diffusion.densities import logit_normal
from synthos.diffusion.dropout import drop
from synthos.diffusion.noising import interpolate, velocity_target
from synthos.diffusion.timesteps import index_from_uniform
from synthos.keys import Draws, KeyedDraws
from synthos.models.parts import Models
from synthos.schema import ModelConfig, RunConfig
from synthos.train.distributed import fill_whole
from synthos.train.ema import Ema
from synthos.train.optim import build_optimizer, clip_gradients, set_lr
from synthos.train.validate import encode_all

EXPERIMENT = "decomposer_photos"
STEPS = 800  # the optimiser is otherwise the experiment's
DROP = 0.3  # probability that T5's states are the empty prompt's, and that CLIP's are
LEAST = 0.10  # of the velocity's variance: what another prompt has to change


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    folder = prepare(args.steps)
    found = json.loads((folder / "base.json").read_text())
    print(f"{folder}: {json.dumps(found, indent=1)}")
    return 0 if min(found[split]["dependence"] for split in SPLITS) >= LEAST else 1


def prepare(steps: int = STEPS, *overrides: str) -> Path:
    """The folder of the base that the experiment names, trained unless it is there; base.json is written last."""
    from launch.compose import compose

    config = compose([f"experiment={EXPERIMENT}", "cluster=local", f"optim.steps={steps}", *overrides]).config
    folder = Path(config.model.parts["transformer"].path).parent
    if (folder / "base.json").is_file():
        return folder
    photos.prepare(Path(str(config.data.shards)).parent)
    started = time.monotonic()
    recipe, loss = train(config)
    minutes = (time.monotonic() - started) / 60
    recipe.network.transformer.save_pretrained(folder / "transformer")
    found: dict[str, Any] = {split: measure(config, recipe, split) for split in SPLITS}
    found |= {"steps": steps, "train_minutes": minutes, "loss": loss}
    (folder / "base.json").write_text(json.dumps(found, indent=1) + "\n")
    return folder


def train(config: RunConfig) -> tuple[Any, float]:
    """The recipe with its transformer trained, and the loss of the last fifty steps."""
    optim, steps, device = config.optim, last_step(config, 0), torch.device("cpu")
    models = Models(ModelConfig("tiny"), Path(config.cache_dir))
    recipe: Any = build_recipe(config.recipe, models)
    fill_frozen(recipe, models, device, torch.float32)
    fill_whole(recipe.network, models.tensors(recipe.network), device)
    transformer, null = recipe.network.transformer.requires_grad_(True), recipe.null()
    groups = {"transformer": list(transformer.parameters())}
    optimizer = build_optimizer(groups, optim)
    average = Ema(dict(transformer.named_parameters()), config.ema)
    stream = Stream(config.data, recipe.inputs, batch_size=config.batch.size, rank=0, world=1, seed=config.seed)
    losses: list[float] = []
    for step in range(steps):
        batch = stream.next()
        loss = flow_loss(recipe, encode_all(recipe, batch), null, KeyedDraws(config.seed, batch.ids, batch.epochs))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        clip_gradients(groups, optim.clip)
        set_lr(optimizer, optim, step, steps)
        optimizer.step()
        average.update(step)
        losses = [*losses, loss.item()][-50:]
        if (step + 1) % 50 == 0:
            print(f"base: step {step + 1}/{steps}  loss {sum(losses) / len(losses):.4f}", flush=True)
    with average.applied(transformer):
        averaged = {name: parameter.detach().clone() for name, parameter in transformer.named_parameters()}
    transformer.load_state_dict(averaged, strict=False)
    transformer.requires_grad_(False)
    return recipe, sum(losses) / len(losses)


def flow_loss(recipe: Any, features: Features, null: Features, draws: Draws) -> Tensor:
    """Mean squared error of the velocity under whole prompts, whose parts are dropped independently."""
    index = index_from_uniform(logit_normal(draws.uniform("t")), len(recipe.grid))
    sigma, noise = recipe.grid[index].float(), draws.normal("noise", features["latents"].shape[1:])
    dropped = {name: draws.uniform(f"drop_{name}") for name in ("t5", "clip")}
    parts = {"text": dropped["t5"], "clip": dropped["clip"], "pooled": dropped["clip"]}
    prompt = {name: drop(features[name], null[name], u, DROP) for name, u in parts.items()}
    found = velocity(recipe, interpolate(features["latents"], noise, sigma), sigma, whole(prompt))
    return (found - velocity_target(features["latents"], noise)).square().mean()


def measure(config: RunConfig, recipe: Any, split: str) -> dict[str, float]:
    """What another prompt changes, as a share of the velocity's variance; of the whole prompt, and of T5's part."""
    shards = str(Path(str(config.data.shards)).parent / split)
    held_out = HeldOut(dataclasses.replace(config.data, validation=shards), recipe.inputs)
    batch: Batch = held_out.batch(list(range(len(held_out))))
    both, t5 = measure_dependence(recipe, batch, encode_all(recipe, batch))
    return {"dependence": both, "dependence_t5": t5}


if __name__ == "__main__":
    sys.exit(main())
