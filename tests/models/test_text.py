from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from synthos.models.parts import Models
from synthos.models.text import build_text_encoder, encode_text, load_tokenizer, save_tiny_tokenizer
from tests.models.conftest import fill

TEXTS = ["a photograph of a cat, the upper left quadrant", "", "Zürich, 3 a.m. — \U0001f680"]


@pytest.fixture(scope="module")
def encoder(tiny: Models) -> Any:
    return fill(tiny, build_text_encoder(tiny))


@pytest.fixture(scope="module")
def tokenizer(tiny: Models) -> Any:
    return load_tokenizer(tiny)


def alone(encoder: Any, tokenizer: Any, text: str) -> Tensor:
    """States of one text without any padding, [N, D]."""
    ids = torch.tensor([tokenizer(text).input_ids])
    states: Tensor = encoder(input_ids=ids).last_hidden_state[0]
    return states


def test_states_are_those_of_each_text_alone_and_zeros(encoder: Any, tokenizer: Any) -> None:
    states = encode_text(encoder, tokenizer, TEXTS)
    assert states.shape == (3, 512, 32)
    for row, text in zip(states, TEXTS, strict=True):
        expected = alone(encoder, tokenizer, text)
        assert torch.allclose(row[: len(expected)], expected, atol=1e-5)
        assert torch.count_nonzero(row[len(expected) :]) == 0


def test_states_are_those_of_the_fully_padded_batch(encoder: Any, tokenizer: Any) -> None:
    padded = tokenizer(TEXTS, padding="max_length", max_length=64, return_tensors="pt")
    mask = padded.attention_mask
    expected = encoder(input_ids=padded.input_ids, attention_mask=mask).last_hidden_state * mask[..., None]
    assert torch.allclose(encode_text(encoder, tokenizer, TEXTS, length=64), expected, atol=1e-5)


def test_the_null_text_is_one_vector_and_zeros(encoder: Any, tokenizer: Any) -> None:
    null = encode_text(encoder, tokenizer, [""])
    assert null.abs().sum(-1).nonzero().tolist() == [[0, 0]]


def test_long_texts_are_cut_and_still_end(encoder: Any, tokenizer: Any) -> None:
    states = encode_text(encoder, tokenizer, ["red " * 40], length=8)
    ids = tokenizer("red " * 40, truncation=True, max_length=8).input_ids
    assert states.shape == (1, 8, 32)
    assert states.abs().sum(-1).count_nonzero() == 8
    assert ids[-1] == tokenizer.eos_token_id


def test_an_encoder_in_train_mode_is_refused(encoder: Any, tokenizer: Any) -> None:
    encoder.train()
    try:
        with pytest.raises(AssertionError, match="eval"):
            encode_text(encoder, tokenizer, TEXTS)
    finally:
        encoder.eval()


def test_tiny_tokenizer_has_umt5s_special_ids_and_loses_nothing(encoder: Any, tokenizer: Any) -> None:
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert len(tokenizer) == encoder.config.vocab_size == 512
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert ids[-1] == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tiny_tokenizer_is_the_same_on_every_machine(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_tiny_tokenizer(tmp_path / name)
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """A random umT5 as transformers saves it, in several files."""
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    config = UMT5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    UMT5EncoderModel(config).save_pretrained(tmp_path / "saved", max_shard_size="10KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    return UMT5EncoderModel.from_pretrained(tmp_path / "saved").eval()


def test_a_hub_folder_loads_as_transformers_loads_it(open_part: Callable[..., Any], saved: Any, tmp_path: Path) -> None:
    encoder = open_part(build_text_encoder, "text_encoder", tmp_path / "saved")
    ids = torch.tensor([[5, 9, 33, 1], [7, 1, 0, 0]])
    mask = (ids != 0).long()
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    expected = saved(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.allclose(encoder(input_ids=ids, attention_mask=mask).last_hidden_state, expected, atol=1e-6)


def test_tied_embeddings_are_found_under_either_name(open_part: Callable[..., Any], saved: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = {k: v.clone() for k, v in saved.state_dict().items() if k != "shared.weight"}
    save_file(state, tmp_path / "model.safetensors")
    saved.config.save_pretrained(tmp_path)
    encoder = open_part(build_text_encoder, "text_encoder", tmp_path)
    assert torch.equal(encoder.shared.weight, saved.shared.weight)
