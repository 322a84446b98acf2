"""Does a recipe redraw a picture from its image tokens? For every recipe with the features `latents...` and `image`.

Every measure asks with the empty prompt, so that only the image tokens can help:

- fixed-grid loss before and after training, and after training with image tokens over without;
- matching score: over ordered pairs of held-out pictures, how often the picture generated from a reference is nearer to
  that reference than to the other one, in mean colours of a 4 x 4 grid. Chance is 50 %. Pairs of one photograph share a
  palette, so only layout can tell them apart.
"""

import torch
from torch import Tensor

from benchmarks.measures import Limit, Opened, Rows, matching_score, split_pairs
from synthos.data.stream import HeldOut
from synthos.generate import Generator
from synthos.recipes.base import Encoded
from synthos.train.validate import Validator, sample

DRAWS = 4  # noises per held-out picture
STEPS = 20  # of sampling
I2I = {
    "end_over_start": Limit("validation loss, end / start", "<=", 0.40),
    "with_over_without": Limit("loss with tokens / without", "<=", 0.75),
    "match_different": Limit("matching, different photographs", ">=", 0.90),
    "match_same": Limit("matching, same photograph", ">=", 0.85),
    "match_different_dropped": Limit("the same with the image dropped", "+-", 0.50),
    "match_same_dropped": Limit("the same with the image dropped", "+-", 0.50),
}
SIGLIP = {
    "match_different": Limit("matching, different photographs", ">=", 0.80),
    "match_different_dropped": Limit("the same with the condition zeroed", "+-", 0.50),
    "match_same_dropped": Limit("the same with the condition zeroed", "+-", 0.50),
}


def measure(opened: Opened, held_out: HeldOut) -> tuple[dict[str, float], Rows]:
    """Every figure of one held-out set; references and one generated picture of each."""
    losses = measure_losses(opened, held_out)
    scores, references, made = measure_matching(opened.trained, held_out)
    picks = list(range(0, len(references), max(1, len(references) // 12)))[:12]
    return losses | scores, [[references[i] for i in picks], [made[i] for i in picks]]


def measure_losses(opened: Opened, held_out: HeldOut) -> dict[str, float]:
    """Fixed-grid losses with the empty prompt, and their ratios."""
    text = [name for name, feature in opened.trained.recipe.features.items() if feature.group == "text"]

    def loss(generator: Generator, *drop: str) -> float:
        empty = Encoded({}, {}, [])
        validator = Validator(
            generator.recipe, opened.world, held_out, empty, generator.null, 16, len(held_out), seed=0
        )
        table = validator.loss_grid(drop=(*text, *drop))
        assert table is not None
        return table.mean().item()

    start, end, without = loss(opened.untrained), loss(opened.trained), loss(opened.trained, "image")
    return {"loss_start": start, "loss_end": end, "end_over_start": end / start, "with_over_without": end / without}


def measure_matching(trained: Generator, held_out: HeldOut) -> tuple[dict[str, float], Tensor, Tensor]:
    """Matching scores with and without the image; references and one picture of each, [R, 3, H, W] in [0, 1]."""
    batch = held_out.batch(list(range(len(held_out))))
    references = batch.images("image").float() / 255
    images = trained.recipe.encode(batch.to(trained.device), "image")["image"]
    made = [generate(trained, images, draw) for draw in range(DRAWS)]
    dropped = [generate(trained, trained.null["image"].expand_as(images), draw) for draw in range(DRAWS)]
    different, same = split_pairs(batch.texts("about"))
    scores = {
        "match_different": matching_score(references, made, different),
        "match_same": matching_score(references, made, same),
        "match_different_dropped": matching_score(references, dropped, different),
        "match_same_dropped": matching_score(references, dropped, same),
    }
    return scores, references, made[0]


@torch.no_grad()
def generate(trained: Generator, images: Tensor, draw: int) -> Tensor:
    """One picture per row of image tokens, with the empty prompt and a noise of its own, [R, 3, H, W]."""
    asked = trained.recipe.Request
    requests = [asked(name=str(row), seed=row * DRAWS + draw, steps=STEPS) for row in range(len(images))]
    encoded = trained.recipe.encode_requests(requests, trained.size)
    encoded.conditions["image"] = images
    rows = list(range(len(images)))
    return torch.cat(sample(trained.recipe, encoded.select(rows, trained.device), trained.null, trained.device))
