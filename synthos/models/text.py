"""umT5: captions to one vector per token."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from synthos.models.parts import Models
from synthos.models.tiny import Tiny

VOCABULARY = 512  # entries of the tiny tokenizer
PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2, as in umT5
CAPTIONS = """
a photograph of an astronaut, a woman in an orange suit, with a flag in the background
a close-up of a cat with brown and white fur, its green eyes in the upper left
a cup of coffee on a wooden table, a silver spoon in the lower right
a rocket standing in front of a dark blue sky, bright lights at the bottom
stars and galaxies, mostly black, with yellow and red points near the centre
the retina of a human eye, a pale disc on the right and thin vessels on the left
tissue cells under a microscope, purple and pink, brown spots in the lower left quadrant
a red motorcycle in a garage, tools on a shelf in the upper right quadrant
a small picture showing the top of a house between trees, grey clouds above
part of a painting with flowers and water in the foreground, mountains behind
the upper left quadrant of the image is dark, the upper right quadrant is light
the lower half is mostly grey, the colours are warm and the contrast is high
a portrait of a man with black hair, smiling, soft light from one side
a city street at night, cars, windows and golden reflections on wet ground
a landscape in the style of an oil drawing, broad strokes, cool and blue
"""  # what the tiny tokenizer learns its words from


def save_tiny_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE on `CAPTIONS` and write it as `AutoTokenizer.from_pretrained` reads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, EOS, UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CAPTIONS.splitlines(), trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    wrapper: Any = PreTrainedTokenizerFast
    wrapper(tokenizer_object=bpe, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN).save_pretrained(folder)


TINY_TOKENIZER = Tiny("PreTrainedTokenizerFast", {"vocab_size": VOCABULARY}, save=save_tiny_tokenizer)
TINY_TEXT = Tiny(
    "UMT5EncoderModel",
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


def build_text_encoder(models: Models) -> Any:
    """The part `text_encoder`, a UMT5EncoderModel."""
    return models.build("text_encoder", TINY_TEXT)


def load_tokenizer(models: Models) -> Any:
    """The part `tokenizer`, as transformers reads it from the part's folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(models.folder("tokenizer", TINY_TOKENIZER))


@torch.no_grad()
def encode_text(encoder: Any, tokenizer: Any, texts: list[str], length: int = 512) -> Tensor:
    """States [B, length, D] of `texts`, cut to `length` tokens; exact zeros past each text's own tokens.

    The empty text is one end-of-sequence vector and zeros: the null text. The encoder sees no more padding than the
    longest text needs, which changes no state (attention is masked) and saves most of the work.
    """
    assert not encoder.training, "a frozen encoder is always in eval mode: dropout would change its states"
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    device = next(encoder.parameters()).device
    ids, mask = tokens.input_ids.to(device), tokens.attention_mask.to(device)  # [B, N]
    states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # [B, N, D]
    states = states.masked_fill(mask.unsqueeze(-1) == 0, 0)
    return nn.functional.pad(states, (0, 0, 0, length - states.shape[1]))
