"""SigLIP's tokens against transformers' own model and processor, and tokens from files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from synthos.models.parts import Models
from synthos.models.siglip import (
    TINY_SIGLIP,
    build_image_encoder,
    encode_image,
    load_tokens,
    resize_tokens,
    token_shape,
)
from tests.models.conftest import fill


@pytest.fixture(scope="module")
def encoder(tiny: Models) -> Any:
    return fill(tiny, build_image_encoder(tiny))


def pictures(height: int = 40, width: int = 30) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator)


def test_tokens_are_the_states_before_the_final_norm(tiny: Models, encoder: Any) -> None:
    from transformers import SiglipVisionModel
    from transformers.models.siglip import SiglipImageProcessorPil

    model = SiglipVisionModel.from_pretrained(tiny.folder("image_encoder", TINY_SIGLIP)).eval()
    processor: Any = SiglipImageProcessorPil(size={"height": 36, "width": 36}, resample=3)
    arrays = [picture.permute(1, 2, 0).numpy() for picture in pictures()]
    pixels = torch.as_tensor(np.stack(processor(arrays)["pixel_values"]))
    with torch.no_grad():
        output = model(pixels, output_hidden_states=True)
    states = output.hidden_states[-1]
    assert not torch.allclose(states, output.last_hidden_state, atol=0.1)
    expected = states / states.norm(dim=-1, keepdim=True)
    found = encode_image(encoder, pictures(), 81)
    assert found.shape == (2, 81, 64)
    assert (found - expected).abs().max() < 0.02  # the processor's resize differs by a level of 255 here and there


def test_resizing_is_bilinear_with_corners_not_aligned() -> None:
    """A linear ramp stays one inside: 9 rows to 3 take the values of rows 1, 4 and 7."""
    rows = torch.arange(9.0)
    ramp = torch.stack([rows[:, None].expand(9, 9), rows.expand(9, 9), torch.ones(9, 9)], dim=-1).reshape(1, 81, 3)
    found = resize_tokens(ramp.double(), 9)
    for row, y in enumerate((1.0, 4.0, 7.0)):
        for column, x in enumerate((1.0, 4.0, 7.0)):
            expected = torch.tensor([y, x, 1.0], dtype=torch.float64)
            assert torch.allclose(found[0, 3 * row + column], expected / expected.norm(), atol=1e-6)


@pytest.mark.parametrize("count", [1, 4, 64, 81, 100])
def test_every_token_has_length_one(encoder: Any, count: int) -> None:
    found = encode_image(encoder, pictures(), count)
    assert found.shape == (2, count, 64)
    assert torch.allclose(found.norm(dim=-1), torch.ones(2, count), atol=1e-5)


def test_the_real_tower_has_729_tokens_of_width_1152() -> None:
    import yaml

    from synthos.schema import ModelConfig
    from synthos.strict import load

    page = Path(__file__).parents[2] / "configs" / "model" / "sd1.5_siglip.yaml"
    models = Models(load(ModelConfig, yaml.safe_load(page.read_text())), Path("no/such"), meta_only=True)
    assert token_shape(models) == (729, 1152)
    tower = build_image_encoder(models)
    assert tower.get_parameter("embeddings.position_embedding.weight").shape == (729, 1152)
    assert len(tower.encoder.layers) == 27


def test_a_folder_of_both_towers_is_read(open_part: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    text = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 8}  # fmt: skip
    both = SiglipModel(SiglipConfig(text_config=text, vision_config=TINY_SIGLIP.config)).eval()
    both.save_pretrained(tmp_path / "both")
    encoder = open_part(build_image_encoder, "image_encoder", tmp_path / "both", class_name="SiglipVisionModel")
    pixels = torch.randn(1, 3, 36, 36)
    with torch.no_grad():
        states = both.vision_model(pixels, output_hidden_states=True).hidden_states[-1]
        assert torch.allclose(encoder(pixels).last_hidden_state, states, atol=1e-6)


def test_saved_tokens_are_resized_and_scaled_as_a_pictures_are(encoder: Any, tmp_path: Path) -> None:
    raw = 3 * torch.randn(81, 64, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "own.npy", raw.numpy())
    save_file({"t": raw[None].bfloat16()}, tmp_path / "own.safetensors")
    found = load_tokens(tmp_path / "own.npy", 16, (81, 64))
    assert torch.equal(found, resize_tokens(raw[None], 16))
    assert torch.allclose(load_tokens(tmp_path / "own.safetensors", 16, (81, 64)), found, atol=0.01)
    np.save(tmp_path / "few.npy", found.numpy())
    assert torch.allclose(load_tokens(tmp_path / "few.npy", 16, (81, 64)), found, atol=1e-6)


@pytest.mark.parametrize("shape", [(10, 64), (16, 32), (2, 16, 64), (64,)])
def test_tokens_of_another_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "odd.npy", np.ones(shape, np.float32))
    with pytest.raises(ValueError, match=r"has shape \[.*\]; expected \[16, 64\] or \[81, 64\]"):
        load_tokens(tmp_path / "odd.npy", 16, (81, 64))


def test_tokens_that_are_not_finite(tmp_path: Path) -> None:
    np.save(tmp_path / "odd.npy", np.full((16, 64), np.nan, np.float32))
    with pytest.raises(ValueError, match="not finite"):
        load_tokens(tmp_path / "odd.npy", 16, (81, 64))
