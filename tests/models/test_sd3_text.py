"""Texts as StableDiffusion3Pipeline encodes them, and long ones sentence by sentence."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from synthos.models.parts import Models
from synthos.models.sd3_text import (
    Tokenizers,
    build_clips,
    build_t5,
    encode_clips,
    encode_segments,
    encode_t5,
    load_tokenizers,
    t5_width,
)
from tests.models.conftest import fill

LONG = "a red motorcycle in a garage. " * 20
TEXTS = ["a photograph of a cat, the upper left quadrant", "", "Zürich, 3 a.m. — \U0001f680", LONG]


@dataclass
class Encoders:
    clips: list[Any]
    t5: Any
    tokenizers: Tokenizers


@pytest.fixture(scope="module")
def encoders(tiny: Models) -> Encoders:
    clips = [fill(tiny, clip) for clip in build_clips(tiny)]
    return Encoders(clips, fill(tiny, build_t5(tiny)), load_tokenizers(tiny))


def test_all_three_are_as_the_pipeline_has_them(encoders: Encoders) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline(
        transformer=None, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None,
        text_encoder=encoders.clips[0], tokenizer=encoders.tokenizers.clips[0],
        text_encoder_2=encoders.clips[1], tokenizer_2=encoders.tokenizers.clips[1],
        text_encoder_3=encoders.t5, tokenizer_3=encoders.tokenizers.t5,
    )  # fmt: skip
    with torch.no_grad():
        theirs, _, pooled, _ = pipe.encode_prompt(
            TEXTS, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=40
        )
    clip, ours_pooled = encode_clips(encoders.clips, encoders.tokenizers.clips, TEXTS)
    t5 = encode_t5(encoders.t5, encoders.tokenizers.t5, TEXTS, 40)
    assert clip.shape == (4, 77, 24) and ours_pooled.shape == (4, 24) and t5.shape == (4, 40, 32)
    torch.testing.assert_close(theirs[:, :77, :24], clip)
    assert not theirs[:, :77, 24:].any()
    torch.testing.assert_close(theirs[:, 77:], t5)
    torch.testing.assert_close(pooled, ours_pooled)


def test_padding_is_seen_by_t5_since_there_is_no_mask(encoders: Encoders) -> None:
    short, long = (encode_t5(encoders.t5, encoders.tokenizers.t5, ["a cat"], n)[0, :2] for n in (8, 64))
    assert not torch.allclose(short, long, atol=1e-3)


def segments(encoders: Encoders, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    return encode_segments(encoders.clips, encoders.tokenizers.clips, texts, length)


def alone(encoders: Encoders, sentence: str) -> tuple[Tensor, Tensor]:
    """Penultimate states [n, D] of one sentence without padding, start and end among them, and its pooled vector."""
    states, pooled = [], []
    for encoder, tokenizer in zip(encoders.clips, encoders.tokenizers.clips, strict=True):
        with torch.no_grad():
            output = encoder(input_ids=torch.tensor([tokenizer(sentence).input_ids]), output_hidden_states=True)
        states.append(output.hidden_states[-2][0])
        pooled.append(output.text_embeds[0])
    return torch.cat(states, -1), torch.cat(pooled)


def test_every_sentence_is_encoded_by_itself(encoders: Encoders) -> None:
    sentences = ["A cat sits on a wall.", "Behind it, a red barn!", "clouds"]
    states, pooled = segments(encoders, [" ".join(sentences)], 120)
    own = [alone(encoders, sentence) for sentence in sentences]
    words = torch.cat([own[0][0][:1], *(found[1:-1] for found, _ in own), own[-1][0][-1:]])
    torch.testing.assert_close(states[0, : len(words)], words, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled[0], torch.stack([vector for _, vector in own]).mean(0), rtol=1e-4, atol=1e-5)
    empty, _ = encode_clips(encoders.clips, encoders.tokenizers.clips, [""])
    rest = states[0, len(words) :]
    torch.testing.assert_close(rest, empty[0, -60:].mean(0).expand_as(rest), rtol=1e-4, atol=1e-5)


def test_a_long_sentence_is_not_cut(encoders: Encoders) -> None:
    """150 words in one sentence are two pieces and more; the last word changes the states, as it doesn't for `cut`."""
    text = "red " * 150
    first, second = text + "barn", text + "cat"
    cut = [encode_clips(encoders.clips, encoders.tokenizers.clips, [t])[0] for t in (first, second)]
    whole = [segments(encoders, [t], 400)[0] for t in (first, second)]
    assert torch.equal(*cut) and not torch.allclose(*whole, atol=1e-4)


def test_company_changes_nothing(encoders: Encoders) -> None:
    together, pooled = segments(encoders, TEXTS, 90)
    assert together.shape == (4, 90, 24)
    for row, text in enumerate(TEXTS):
        single, single_pooled = segments(encoders, [text], 90)
        torch.testing.assert_close(together[row], single[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pooled[row], single_pooled[0], rtol=1e-4, atol=1e-5)


def test_an_encoder_in_train_mode_is_refused(encoders: Encoders) -> None:
    encoders.t5.train()
    encoders.clips[0].train()
    try:
        with pytest.raises(AssertionError, match="eval"):
            encode_t5(encoders.t5, encoders.tokenizers.t5, ["a"], 8)
        with pytest.raises(AssertionError, match="eval"):
            encode_clips(encoders.clips, encoders.tokenizers.clips, ["a"])
    finally:
        encoders.t5.eval()
        encoders.clips[0].eval()


def test_width_is_known_without_building(tiny: Models) -> None:
    assert t5_width(tiny) == 32
