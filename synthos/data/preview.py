"""A contact sheet: pictures drawn evenly from all shards, with key and caption, to see what a data set really holds."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from synthos.batch import Input
from synthos.data.decode import decode_image, image_size
from synthos.data.index import ShardIndex
from synthos.data.rewrite import read_members
from synthos.data.selection import choose
from synthos.data.shards import ShardPlace
from synthos.data.store.files import Storage
from synthos.keys import hash64
from synthos.lettering import Font, letter, wrapped

CELL = 192  # pixels of a picture's longer side
TEXT = 46  # pixels of the three lines below it
GAP = 8
CAPTION_LINES = 2
SIZE = 11  # of letters


@dataclass(frozen=True)
class Shown:
    """What a cell of the sheet shows."""

    shard: str
    key: str
    caption: str
    picture: Image.Image | None
    error: str  # why there is no picture


def draw_rows(sizes: list[int], count: int, seed: int) -> list[tuple[int, int]]:
    """Shard and row of `count` samples, or of all if they are fewer: one of each of `count` equal stretches.

    A pure function of its arguments.
    """
    total = sum(sizes)
    count = min(count, total)
    edges = [total * number // count for number in range(count + 1)] if count else [0]
    drawn = [a + hash64("preview", seed, a) % (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    starts = np.array([0, *sizes], np.int64).cumsum()
    shards = starts.searchsorted(drawn, "right") - 1
    return [(int(shard), int(row - starts[shard])) for shard, row in zip(shards, drawn, strict=True)]


def read_shown(
    places: list[ShardPlace],
    open_one: Callable[[int], ShardIndex],
    drawn: Iterable[tuple[int, int]],
    pictures: tuple[str, ...],
    captions: tuple[str, ...],
    storage: Storage,
) -> Iterator[Shown]:
    """The drawn samples; one that can't be read says why."""
    for shard, row in drawn:
        index = open_one(shard)
        name, key = places[shard].name, index.key(row)
        try:
            (members,) = read_members(places[shard], index, [row], storage)
        except ValueError as error:
            yield Shown(name, key, "", None, str(error))
            continue
        found = [_extension(index, row, asked) for asked in (pictures, captions)]
        caption = members[found[1]].decode(errors="replace") if found[1] else ""
        if found[0] is None:
            yield Shown(name, key, caption, None, f"no picture, only {', '.join(members)}")
            continue
        try:
            yield Shown(name, key, caption, thumbnail(members[found[0]]), "")
        except ValueError as error:
            yield Shown(name, key, caption, None, str(error))


def thumbnail(data: bytes) -> Image.Image:
    """The picture within CELL x CELL; ValueError as in `decode_image`."""
    width, height = image_size(data)
    scale = CELL / max(width, height)
    size = max(round(height * scale), 1), max(round(width * scale), 1)
    return Image.fromarray(decode_image(data, *size, "whole").transpose(1, 2, 0))


def draw_sheet(shown: list[Shown], columns: int) -> Image.Image:
    """All cells, row by row."""
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    width, height = CELL + GAP, CELL + TEXT + GAP
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, one in enumerate(shown):
        x, y = number % columns * width + GAP, number // columns * height + GAP
        if one.picture is not None:
            left, top = (CELL - one.picture.width) // 2, (CELL - one.picture.height) // 2
            sheet.paste(one.picture, (x + left, y + top))
        else:
            draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), outline="red")
            error, font = letter(one.error, SIZE)
            draw.multiline_text((x + 4, y + 4), "\n".join(wrapped(error, font, CELL - 8)), "red", font)
        place, font = letter(f"{one.shard.removesuffix('.tar')} / {one.key}", SIZE)
        draw.text((x, y + CELL + 2), _end(place, font), "black", font)
        caption, font = letter(one.caption, SIZE)
        for line, words in enumerate(wrapped(caption, font, CELL, CAPTION_LINES), 1):
            draw.text((x, y + CELL + 2 + line * TEXT // (CAPTION_LINES + 1)), words, "black", font)
    return sheet


def _end(text: str, font: Font) -> str:
    """The last part of a text, as much as a cell is wide."""
    if font.getlength(text) <= CELL:
        return text
    while font.getlength(f"... {text}") > CELL:
        text = text[1:]
    return f"... {text}"


def _extension(index: ShardIndex, row: int, asked: tuple[str, ...]) -> str | None:
    """The first of some extensions that a sample has."""
    column = int(choose(index, Input("text", asked))[row])
    return index.extensions[column] if column >= 0 else None
