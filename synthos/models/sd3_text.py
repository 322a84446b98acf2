"""Texts as Stable Diffusion 3 reads them: CLIP-L and OpenCLIP bigG side by side, and T5 (arXiv 2403.03206, 3.3)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from synthos.batch import Features
from synthos.data.embedding import read_embeddings
from synthos.models.parts import Models
from synthos.models.text import EOS, TINY_TOKENIZER, VOCABULARY, save_tiny_tokenizer
from synthos.models.tiny import Tiny

CLIP_LENGTH = 77  # tokens that CLIP has positions for
STORED = {"text": "t5", "clip": "clip", "pooled": "pooled"}  # what a prompt's features are called in files of others
ClipText = Literal["cut", "segments"]
BOS = "<s>"
SENTENCE = re.compile(r"(?<=[.!?;])\s+|\n+")  # between two sentences
PADDING_STATES = 60  # of the empty prompt, the last ones: their mean stands for no token


def save_tiny_clip_tokenizer(folder: Path) -> None:
    """The tiny tokenizer of texts, with a token at the start and padded by that of the end, as CLIP-L's is."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    save_tiny_tokenizer(folder)
    bpe = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bpe.add_special_tokens([BOS])
    ids = [(BOS, bpe.token_to_id(BOS)), (EOS, bpe.token_to_id(EOS))]
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=ids)
    wrapper: Any = PreTrainedTokenizerFast
    tokenizer = wrapper(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=EOS, model_max_length=CLIP_LENGTH)
    tokenizer.save_pretrained(folder)


def _tiny_clip(width: int) -> Tiny:
    return Tiny(
        "CLIPTextModelWithProjection",
        {
            "vocab_size": VOCABULARY + 1,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "projection_dim": width,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "max_position_embeddings": CLIP_LENGTH,
            "bos_token_id": VOCABULARY,
            "eos_token_id": 1,
            "pad_token_id": 1,
        },
        init=_loud_embeddings,
    )


def _loud_embeddings(module: torch.nn.Module) -> None:
    """Random embeddings of standard deviation 0.02 hardly tell words apart; trained ones do."""
    for name in ("token_embedding", "position_embedding"):
        module.get_parameter(f"text_model.embeddings.{name}.weight").mul_(20)


TINY_CLIPS = {"text_encoder": _tiny_clip(8), "text_encoder_2": _tiny_clip(16)}
TINY_CLIP_TOKENIZER = Tiny("PreTrainedTokenizerFast", {"vocab_size": VOCABULARY + 1}, save=save_tiny_clip_tokenizer)
TINY_T5 = Tiny(
    "T5EncoderModel",
    {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    },
)


def build_clips(models: Models) -> list[Any]:
    """The parts `text_encoder` and `text_encoder_2`, each a CLIPTextModelWithProjection."""
    return [models.build(part, tiny) for part, tiny in TINY_CLIPS.items()]


def build_t5(models: Models) -> Any:
    """The part `text_encoder_3`, a T5EncoderModel."""
    return models.build("text_encoder_3", TINY_T5)


def t5_width(models: Models) -> int:
    """Width of T5's states, without building it."""
    return int(models.settings("text_encoder_3", TINY_T5)["d_model"])


@dataclass(frozen=True)
class Tokenizers:
    """The parts `tokenizer` and `tokenizer_2`, of the two CLIPs, and `tokenizer_3`, of T5."""

    clips: list[Any]
    t5: Any


def load_tokenizers(models: Models) -> Tokenizers:
    """All three, as transformers reads them from the parts' folders."""
    from transformers import AutoTokenizer

    clips = [models.folder(part, TINY_CLIP_TOKENIZER) for part in ("tokenizer", "tokenizer_2")]
    t5 = AutoTokenizer.from_pretrained(models.folder("tokenizer_3", TINY_TOKENIZER))
    return Tokenizers([AutoTokenizer.from_pretrained(folder) for folder in clips], t5)


def check_clip(text: ClipText, length: int) -> None:
    """Raise ValueError for a `length` of CLIP's states that the way to read a text does not give."""
    if text == "cut" and length != CLIP_LENGTH:
        raise ValueError(
            f"recipe.clip_length: {length} is not allowed with recipe.clip_text=cut; expected {CLIP_LENGTH}, or "
            "recipe.clip_text=segments"
        )


def prompt_shapes(models: Models, text_length: int, clip_length: int) -> dict[str, tuple[int, ...]]:
    """The shapes of what `encode_prompts` gives of one prompt, without building an encoder."""
    clips = [models.settings(part, tiny) for part, tiny in TINY_CLIPS.items()]
    states, pooled = (sum(int(clip[key]) for clip in clips) for key in ("hidden_size", "projection_dim"))
    return {"text": (text_length, t5_width(models)), "clip": (clip_length, states), "pooled": (pooled,)}


def load_prompt(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Features:
    """A prompt that was encoded elsewhere, as `encode_prompts` gives one, float32 [1, ...].

    The file's tensors are called as in `STORED` and have these `shapes`, or them with a 1 before. Raises ValueError for
    others, and for what is not finite.
    """
    found = {name: torch.from_numpy(array) for name, array in read_embeddings(path).items()}
    expected = ", ".join(f"{STORED[name]} {list(shape)}" for name, shape in shapes.items())
    if set(found) != set(STORED.values()):
        names = ", ".join(sorted(found)) if path.suffix == ".safetensors" else "one array"
        raise ValueError(f"holds {names or 'nothing'}; expected a .safetensors file of {expected}")
    for name, shape in shapes.items():
        if tuple(found[STORED[name]].shape) not in (shape, (1, *shape)):
            raise ValueError(f"{STORED[name]} has shape {list(found[STORED[name]].shape)}; expected {expected}")
        if not found[STORED[name]].isfinite().all():
            raise ValueError(f"{STORED[name]} holds values that are not finite")
    return {name: found[STORED[name]].reshape(1, *shape) for name, shape in shapes.items()}


def encode_prompts(
    encoders: nn.ModuleDict,
    tokenizers: Tokenizers,
    texts: list[str],
    text_length: int,
    clip_text: ClipText,
    clip_length: int,
    filled_to: int | None = None,
) -> Features:
    """T5's states `text` [B, text_length, D], CLIP's `clip` [B, clip_length, D1 + D2] and `pooled` [B, P1 + P2].

    Args:
        encoders: `clip_l`, `clip_g` and `t5`.
        clip_text: `cut`: CLIP sees the first 77 tokens; `segments`: every sentence by itself.
        filled_to: length that T5's states are filled up to with zeros, which nobody is meant to read.
    """
    clips = [encoders["clip_l"], encoders["clip_g"]], tokenizers.clips
    if clip_text == "cut":
        clip, pooled = encode_clips(*clips, texts)
    else:
        clip, pooled = encode_segments(*clips, texts, clip_length)
    text = encode_t5(encoders["t5"], tokenizers.t5, texts, text_length)
    text = nn.functional.pad(text, (0, 0, 0, (filled_to or text_length) - text_length))
    return {"text": text, "clip": clip, "pooled": pooled}


@torch.no_grad()
def encode_t5(encoder: Any, tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """States [B, length, D] of `texts`, cut or padded to `length` tokens.

    There is no attention mask: SD3 was trained on the states of padding too, and on words that saw it.
    """
    assert not encoder.training, "a frozen encoder is always in eval mode: dropout would change its states"
    tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    states: Tensor = encoder(input_ids=tokens.input_ids.to(encoder.device)).last_hidden_state
    return states


def encode_clips(encoders: Sequence[Any], tokenizers: Sequence[Any], texts: list[str]) -> tuple[Tensor, Tensor]:
    """States [B, 77, D1 + D2] and pooled vectors [B, P1 + P2] of `texts`, each cut to 77 tokens."""
    both = [_encode(e, _ids(t, t(texts, truncation=True, max_length=CLIP_LENGTH).input_ids))
            for e, t in zip(encoders, tokenizers, strict=True)]  # fmt: skip
    return torch.cat([states for states, _ in both], -1), torch.cat([pooled for _, pooled in both], -1)


def encode_segments(
    encoders: Sequence[Any], tokenizers: Sequence[Any], texts: list[str], length: int
) -> tuple[Tensor, Tensor]:
    """States [B, length, D1 + D2] and pooled vectors [B, P1 + P2] of whole texts, sentence by sentence.

    Each sentence is encoded by itself, in pieces of at most 75 tokens; the states of all their words stand between one
    start and one end, the rest is the mean of the empty prompt's last states. Pooled vectors are averaged. (LongAlign,
    arXiv 2410.11817, section 3.)
    """
    both = [_encode_segments(e, t, texts, length) for e, t in zip(encoders, tokenizers, strict=True)]
    return torch.cat([states for states, _ in both], -1), torch.cat([pooled for _, pooled in both], -1)


def _encode_segments(encoder: Any, tokenizer: Any, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    pieces = [_pieces(tokenizer, text) for text in texts]
    rows = [[tokenizer.bos_token_id, *piece, tokenizer.eos_token_id] for text in pieces for piece in text]
    nothing = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    states, pooled = _encode(encoder, _ids(tokenizer, [nothing, *rows]))  # one call, whatever the number of pieces
    padding = states[0, -PADDING_STATES:].mean(0)
    contexts, means, first = [], [], 1
    for text in pieces:
        own = range(first, first := first + len(text))
        last = states[own[-1], len(text[-1]) + 1 :][:1]
        words = [states[row, 1 : len(piece) + 1] for row, piece in zip(own, text, strict=True)]
        context = torch.cat([states[own[0], :1], *words, last])[:length]
        contexts.append(torch.cat([context, padding.expand(length - len(context), -1)]))
        means.append(pooled[own[0] : own[-1] + 1].mean(0))
    return torch.stack(contexts), torch.stack(means)


def _pieces(tokenizer: Any, text: str) -> list[list[int]]:
    """Tokens of each sentence, those of a long one in several pieces; one empty piece for an empty text."""
    room = CLIP_LENGTH - 2  # beside start and end
    sentences = [sentence for sentence in SENTENCE.split(text) if sentence.strip()]
    tokens = [tokenizer(sentence, add_special_tokens=False).input_ids for sentence in sentences]
    return [row[i : i + room] for row in tokens for i in range(0, len(row), room)] or [[]]


def _ids(tokenizer: Any, rows: list[list[int]]) -> Tensor:
    """int64 [B, 77], padded by the tokenizer's own token."""
    padded = [*map(torch.tensor, rows), torch.zeros(CLIP_LENGTH)]
    return pad_sequence(padded, batch_first=True, padding_value=tokenizer.pad_token_id)[:-1].long()


@torch.no_grad()
def _encode(encoder: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """States before the last block [B, 77, D] and the projected pooled vector [B, P]."""
    assert not encoder.training, "a frozen encoder is always in eval mode"
    output = encoder(input_ids=ids.to(encoder.device), output_hidden_states=True)
    return output.hidden_states[-2], output.text_embeds
