"""Text in pictures: in a font that has its characters, in lines that fit."""

import unicodedata
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from math import ceil

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
FONTS = (  # Pillow brings one font, of ASCII and little more; of these, a machine that has a screen or a LaTeX has some
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc",
    "DroidSansFallback.ttf", "Arial Unicode.ttf",
)  # fmt: skip


def letter(text: str, size: int) -> tuple[str, Font]:
    """The text and a font that can draw it.

    That is Pillow's own, or else the font of this machine that has most of the characters. What none has loses its
    accents if that makes it ASCII, and is spelt as in Python if not: never a box that could be anything.
    """
    best, lacks = _own(size), _lacking(text, _own(size))
    for name in FONTS:
        if not lacks:
            break
        font = _font(name, size)
        if font is not None and len(lacking := _lacking(text, font)) < len(lacks):
            best, lacks = font, lacking
    return "".join(_plain(c) if c in lacks else c for c in text), best


def wrapped(text: str, font: Font, width: int, most: int | None = None) -> list[str]:
    """The words of a text in lines of at most `width` pixels; of more than `most` lines the last one ends in "..."."""
    found: list[str] = []
    for line in _lines(text, font, width):
        if len(found) == most:
            last = found[-1]
            while last and font.getlength(f"{last} ...") > width:
                last = last[:-1]
            found[-1] = f"{last.rstrip()} ..."
            break
        found.append(line)
    return found


def _lines(text: str, font: Font, width: int) -> Iterator[str]:
    line = ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if len(longer) <= width and font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            yield line
        while len(word) > width or font.getlength(word) > width:  # as where a language has no spaces
            fits = bisect_right(range(1, width), width, key=lambda n: ceil(font.getlength(word[:n])))
            yield word[: max(fits, 1)]
            word = word[max(fits, 1) :]
        line = word
    if line:
        yield line


@lru_cache(maxsize=8)
def _own(size: int) -> Font:
    return ImageFont.load_default(size)


@lru_cache(maxsize=64)
def _font(name: str, size: int) -> Font | None:
    """Where the system keeps its fonts; None where there is none of this name."""
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


def _lacking(text: str, font: Font) -> set[str]:
    """The characters that a font draws as it draws what no font has."""
    unknown = _drawn("\uffff", font)
    unusual = (c for c in set(text) if not c.isascii() and not c.isspace())
    return {c for c in unusual if not c.isprintable() or _drawn(c, font) == unknown}


def _drawn(character: str, font: Font) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)


def _plain(character: str) -> str:
    """A character in ASCII."""
    kind = unicodedata.category(character)
    if kind in ("Pd", "Cf"):  # dashes, and what formats and is not seen
        return "-" if kind == "Pd" else ""
    letters = "".join(c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c))
    return letters if letters and letters.isascii() else character.encode("ascii", "backslashreplace").decode()
