"""Do component prompts say what the whole prompt says? Every measure asks about held-out pictures and their prompts.

- kd, start and end: the recipe's own loss against the frozen transformer on the whole prompt, on the fixed grid;
- matching: over ordered pairs of held-out prompts, how often the velocity under a prompt's components is nearer to that
  under the whole of the prompt than the velocity under the other one's components is. Only components change places:
  the noised picture, CLIP's states and pooled vector stay, so that they cannot tell the two apart. Chance is 50 %;
- dependence of the base, whose decomposer would prove nothing if it did not listen to its prompt: what its velocity
  changes by when the prompt becomes another one, over the velocity's variance.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measures import Limit, Opened, Rows, pair_score, split_pairs
from synthos.batch import Batch, Features
from synthos.data.stream import HeldOut
from synthos.diffusion.noising import interpolate
from synthos.diffusion.sampling import sample_flow
from synthos.diffusion.timesteps import index_from_uniform
from synthos.generate import Generator
from synthos.keys import FixedDraws
from synthos.models import sd3
from synthos.models.autoencoder_kl import decode_latents
from synthos.train.validate import encode_all

PAIRED = 24  # held-out samples that are told apart: each pair takes a pass of the network at every time
STEPS = 20  # of sampling
LIMITS = {
    "kd_end_over_start": Limit("kd loss, end / start", "<=", 0.50),
    "match_all": Limit("matching, all pairs of prompts", ">=", 0.80),
    "base_dependence": Limit("base: change by another prompt / variance", ">=", 0.10),
}


def measure(opened: Opened, held_out: HeldOut) -> tuple[dict[str, float], Rows]:
    """Every figure of one held-out set; references, the base's pictures, compositions, and their components."""
    trained = opened.trained
    batch = held_out.batch(list(range(len(held_out)))).to(trained.device)
    features = encode_all(trained.recipe, batch)
    start, _ = measure_loss(opened.untrained, batch, features)
    end, cosine = measure_loss(trained, batch, features)
    paired = min(PAIRED, len(batch))
    cost = measure_pairs(trained.recipe, batch.slice(0, paired), {k: v[:paired] for k, v in features.items()})
    both, t5 = measure_dependence(trained.recipe, batch, features)
    different, same = split_pairs(batch.texts("about")[:paired])
    figures = {
        "kd_start": start,
        "kd_end": end,
        "kd_end_over_start": end / start,
        "match_all": pair_score(cost, [*different, *same]),
        "match_different": pair_score(cost, different),
        "match_same": pair_score(cost, same),
        "base_dependence": both,
        "base_dependence_t5": t5,
        "component_cosine": cosine,
    }
    return figures, draw(trained.recipe, batch, features)


@torch.no_grad()
def measure_loss(generator: Generator, batch: Batch, features: Features) -> tuple[float, float]:
    """The kd loss and the components' mean cosine, over samples and the fixed grid of times."""
    parts = [generator.recipe.loss(features, generator.null, draws).parts for draws in _grid(batch)]
    kd, cosine = (torch.stack([part[name] for part in parts]).mean().item() for name in ("kd", "component_cosine"))
    return kd, cosine


@torch.no_grad()
def measure_pairs(recipe: Any, batch: Batch, features: Features) -> Tensor:
    """How far picture i's velocity under prompt j's components is from that under its own whole prompt, [R, R]."""
    own = torch.arange(len(batch), device=batch.ids.device)
    components = recipe.network(text=features["text"])[0]  # [R, N, T, D]
    cost = torch.zeros(len(own), len(own))
    for x_t, sigma in _noised(recipe, batch, features):
        teacher = velocity(recipe, x_t, sigma, whole(features))
        for shift in range(len(own)):
            other = own.roll(-shift)
            found = velocity(recipe, x_t, sigma, {**features, "components": components[other]})
            cost[own, other] += (found - teacher).square().flatten(1).mean(1).cpu() / FixedDraws.NUM_T
    return cost


@torch.no_grad()
def measure_dependence(recipe: Any, batch: Batch, features: Features) -> tuple[float, float]:
    """Mean square of the velocity's change when its prompt becomes the next row's, over the velocity's variance.

    First with the whole prompt changed, then with T5's states alone.
    """
    changes, velocities = [], []
    prompt = whole(features)
    others = {name: value.roll(-1, 0) for name, value in prompt.items()}
    for x_t, sigma in _noised(recipe, batch, features):
        velocities.append(velocity(recipe, x_t, sigma, prompt))
        asked = others, {**prompt, "components": others["components"]}
        changes.append([(velocity(recipe, x_t, sigma, other) - velocities[-1]).square().mean() for other in asked])
    both, t5 = (torch.tensor(changes).mean(0) / torch.stack(velocities).var().cpu()).tolist()
    return both, t5


@torch.no_grad()
def draw(recipe: Any, batch: Batch, features: Features) -> Rows:
    """Twelve samples: reference, the base on the whole prompt, the composition, and each component, from one noise."""
    rows = list(range(0, len(batch), max(1, len(batch) // 12)))[:12]
    chosen = {name: value[rows] for name, value in features.items()}
    draws = FixedDraws(1, batch.ids[rows], [0] * len(rows), chosen["latents"].device)
    noise = draws.normal("noise", chosen["latents"].shape[1:])
    components = recipe.network(text=chosen["text"])[0]
    shown = [batch.images("image")[rows].float() / 255]
    for part in (None, components, *components.split(1, dim=1)):
        condition = whole(chosen) if part is None else {**chosen, "components": part}
        predict = partial(_at_time, recipe, condition)
        latents = sample_flow(predict, noise, STEPS, recipe.config.shift)
        shown.append(decode_latents(recipe.frozen["vae"], latents))
    return [list(pictures.cpu()) for pictures in shown]


def _at_time(recipe: Any, condition: Features, x_t: Tensor, t: Tensor) -> Tensor:
    return velocity(recipe, x_t, t / 1000, condition)


def whole(features: Features) -> Features:
    """A prompt as its own only component: what the teacher is given."""
    return {"components": features["text"].unsqueeze(1), "clip": features["clip"], "pooled": features["pooled"]}


def velocity(recipe: Any, x_t: Tensor, sigma: Tensor, condition: Features) -> Tensor:
    """The mean of the velocities under a condition's components, [B, C, h, w], at noise levels `sigma` [B]."""
    asked = {name: condition[name] for name in ("components", "clip", "pooled")}
    return sd3.predict(recipe.network, x_t, 1000 * sigma, asked, recipe.compute_dtype)[1].mean(1)


def _noised(recipe: Any, batch: Batch, features: Features) -> Iterator[tuple[Tensor, Tensor]]:
    """Noised latents and noise levels at eight places of the shifted grid."""
    for draws in _grid(batch):
        index = index_from_uniform(draws.uniform("t"), len(recipe.grid))
        sigma = recipe.grid.to(index.device)[index].to(features["latents"])
        yield interpolate(features["latents"], draws.normal("noise", features["latents"].shape[1:]), sigma), sigma


def _grid(batch: Batch) -> list[FixedDraws]:
    device = batch.images("image").device
    return [FixedDraws(0, batch.ids, [index] * len(batch), device) for index in range(FixedDraws.NUM_T)]
