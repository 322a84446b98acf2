"""Triplets for object insertion: a scene that holds an object, the object by itself, and a mask of where it stands.

A sample's members are target.jpg, object.jpg (or .png, .webp: as the pictures are), mask.png, and a .txt where there is
a caption. The mask is grey, 255 where the object is to be inserted and 0 elsewhere.
"""

import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from synthos.data.decode import decode_image, image_size, open_image
from synthos.data.write import Members, Picture, caption_members, check_picture, read_picture

ROUNDED = "rounded"


@dataclass(frozen=True)
class Triplet:
    """One sample of a data set of triplets."""

    target: Picture
    object: Picture
    mask: Picture
    caption: str | None
    facts: dict[str, Any] = field(default_factory=dict)  # further entries of its .json
    number: int = 0
    masks: Counter[str] = field(default_factory=Counter)  # counts, under `ROUNDED`, those that held greys

    @property
    def image(self) -> Picture:
        return self.target

    def members(self) -> tuple[Members, dict[str, Any]]:
        members, told = caption_members(self.caption)
        for name, picture in (("target", self.target), ("object", self.object)):
            with _named(name):
                data = read_picture(picture)
                members[f"{name}.{check_picture(data)}"] = data
                if name == "target":
                    width, height = image_size(data)
        with _named("mask"):
            members["mask.png"], rounded = clean_mask(read_picture(self.mask), width, height)
        self.masks[ROUNDED] += rounded
        return members, {**self.facts, **told, "width": width, "height": height}


def clean_mask(data: bytes, width: int, height: int) -> tuple[bytes, bool]:
    """A mask as grey PNG of 0 and 255, and whether it held anything between, which is rounded at half.

    A mask that is so already keeps its bytes. Raises ValueError for one that is unreadable, not `width` x `height` as
    it is seen, or black.
    """
    found = image_size(data)
    if found != (width, height):
        raise ValueError(f"not of the target's size: {found[0]} x {found[1]} for {width} x {height}")
    pixels = decode_image(data, height, width, "whole").transpose(1, 2, 0)  # [H, W, 3]
    grey = np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))
    white = grey >= 128
    if not white.any():
        raise ValueError("black: there is nowhere to insert the object")
    clean = white.astype(np.uint8) * 255
    rounded = bool((clean != grey).any())
    image = open_image(data)
    if not rounded and (image.format, image.mode) == ("PNG", "L"):
        return data, False
    buffer = io.BytesIO()
    Image.fromarray(clean).save(buffer, "PNG")
    return buffer.getvalue(), rounded


@contextmanager
def _named(member: str) -> Iterator[None]:
    """A ValueError raised within tells of which member it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{member}, {error}") from None
