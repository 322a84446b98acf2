from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from synthos.models.clip import (
    MEAN,
    PREPROCESS,
    STD,
    TINY_CLIP,
    build_image_encoder,
    crop,
    encode_image,
    image_width,
    squash,
    zero_tokens,
)
from synthos.models.parts import Models
from synthos.schema import ModelConfig, PartConfig
from tests.models.conftest import fill

SIZES = [(480, 832), (97, 61), (64, 64), (20, 33)]


def picture(height: int, width: int) -> Tensor:
    """Waves under noise, uint8 [1, 3, H, W]."""
    generator = torch.Generator().manual_seed(height)
    y, x = torch.linspace(0, 9, height)[:, None], torch.linspace(0, 7, width)
    waves = torch.stack([torch.sin(x + y), torch.cos(x * y), torch.sin(y - x)]) * 90 + 128
    noisy = waves + 40 * torch.randn(3, height, width, generator=generator)
    return noisy.clamp(0, 255).byte()[None]


def as_pillow(images: Tensor) -> Image.Image:
    return Image.fromarray(images[0].permute(1, 2, 0).numpy())


@pytest.fixture(scope="module")
def encoder(tiny: Models) -> Any:
    return fill(tiny, build_image_encoder(tiny))


@pytest.mark.parametrize(("size", "limit"), [((480, 832), 1), ((64, 64), 1), ((20, 33), 1), ((97, 61), 5)])
def test_squash_is_pillows_bicubic(size: tuple[int, int], limit: int) -> None:
    """To one 8-bit level; a little more for portraits, whose columns newer versions of Pillow resize first."""
    images = picture(*size)
    expected = np.asarray(as_pillow(images).resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    difference = np.abs(squash(images, 32)[0].numpy() - expected)
    assert difference.max() <= limit
    assert difference.mean() < 0.25


@pytest.mark.parametrize("size", [(100, 32), (32, 100)])
def test_one_axis_is_resized_as_pillow_does(size: tuple[int, int]) -> None:
    images = picture(*size)
    expected = np.asarray(as_pillow(images).resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(squash(images, 32)[0].numpy() - expected).max() <= 1


@pytest.mark.parametrize("size", SIZES)
def test_crop_is_clips_own_processor_to_one_level(size: tuple[int, int]) -> None:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    images = picture(*size)
    pixels = torch.as_tensor(np.asarray(processor(as_pillow(images))["pixel_values"][0]))
    levels = (pixels * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255
    assert (crop(images, 32)[0] - levels).abs().max() <= 1.01


def test_squash_and_crop_differ_where_the_picture_is_no_square() -> None:
    assert torch.equal(squash(picture(64, 64), 32), crop(picture(64, 64), 32))
    assert (squash(picture(480, 832), 32) - crop(picture(480, 832), 32)).abs().mean() > 10


@pytest.mark.parametrize("preprocess", ["squash", "crop"])
def test_tokens_are_the_whole_towers_penultimate_states(tiny: Models, encoder: Any, preprocess: str) -> None:
    from transformers import CLIPVisionModel

    images = picture(48, 80)
    levels = {"squash": squash, "crop": crop}[preprocess](images, 32)
    pixels = (levels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    whole = CLIPVisionModel.from_pretrained(tiny.folder("image_encoder", TINY_CLIP)).eval()
    states = whole(pixel_values=pixels, output_hidden_states=True).hidden_states
    tokens = encode_image(encoder, images, preprocess)
    assert tokens.shape == (1, 17, 64)
    assert len(states) == 4
    assert torch.allclose(tokens, states[-2], atol=1e-6)
    assert not torch.allclose(tokens, states[-1], atol=1e-2)


def test_tiny_tokens_tell_pictures_and_positions_apart(encoder: Any) -> None:
    left = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    left[..., :32] = 255
    tokens = encode_image(encoder, torch.cat([left, left.flip(-1), left]))
    assert torch.allclose(tokens[0], tokens[2], atol=1e-5)
    assert (tokens[0] - tokens[1]).norm() > 0.1 * tokens[0].norm()
    assert torch.cdist(tokens[0, 1:], tokens[0, 1:]).fill_diagonal_(1).min() > 1e-2


def test_width_and_null_are_those_of_the_tokens(tiny: Models, encoder: Any) -> None:
    null = zero_tokens(encoder)
    assert null.shape == (1, 17, image_width(tiny))
    assert null.count_nonzero() == 0


def test_an_unknown_preprocess_lists_the_known(encoder: Any) -> None:
    with pytest.raises(ValueError, match=r"'croop'.*did you mean 'crop'.*squash"):
        encode_image(encoder, picture(32, 32), "croop")


def test_an_encoder_in_train_mode_is_refused(encoder: Any) -> None:
    encoder.train()
    try:
        with pytest.raises(AssertionError, match="eval"):
            encode_image(encoder, picture(32, 32))
    finally:
        encoder.eval()


VISION = {k: v for k, v in TINY_CLIP.config.items() if k != "hidden_act"}
TEXT = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("towers", ["vision", "both"])
def test_a_hub_folder_loads_as_transformers_loads_it(
    open_part: Callable[..., Any], tmp_path: Path, towers: str
) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    if towers == "vision":
        saved: Any = CLIPVisionModel(CLIPVisionConfig(**VISION))
    else:
        saved = CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT))
    saved.save_pretrained(tmp_path / "saved")
    encoder = open_part(build_image_encoder, "image_encoder", tmp_path / "saved")
    reference = CLIPVisionModel.from_pretrained(tmp_path / "saved").eval()
    pixels = (squash(picture(40, 40), 32) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    expected = reference(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(encoder.embeddings.position_ids, torch.arange(17)[None])
    assert torch.allclose(encode_image(encoder, picture(40, 40)), expected, atol=1e-6)
    models = Models(ModelConfig("local", {"image_encoder": PartConfig(str(tmp_path / "saved"))}), tmp_path / "cache")
    assert image_width(models) == 64


@pytest.mark.parametrize("size", [(48, 80), (80, 48), (64, 64)])
def test_crop_encodes_as_diffusers_image_to_video_pipeline(tiny: Models, encoder: Any, size: tuple[int, int]) -> None:
    """Up to the rounding of its resize, one level in 255; squash is far from it but for squares."""
    from diffusers import WanImageToVideoPipeline
    from transformers import CLIPImageProcessor, CLIPVisionModel

    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    whole = CLIPVisionModel.from_pretrained(tiny.folder("image_encoder", TINY_CLIP)).eval()
    pipe = WanImageToVideoPipeline(None, None, None, None, image_processor=processor, image_encoder=whole)
    images = picture(*size)
    with torch.no_grad():
        theirs = pipe.encode_image(as_pillow(images), "cpu")
    distances = {kind: (encode_image(encoder, images, kind) - theirs).norm() / theirs.norm() for kind in PREPROCESS}
    assert distances["crop"] < 0.02
    assert distances["squash"] < 0.02 if size[0] == size[1] else distances["squash"] > 10 * distances["crop"]
