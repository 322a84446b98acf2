"""Sheets of pictures: where everything is."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synthos.train.pictures import LINE, MARGIN, sheet

COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200)]


@pytest.mark.parametrize("columns", [1, 2, 3, 9])
def test_references_stand_above_their_pictures(tmp_path: Path, columns: int) -> None:
    cells: list[tuple[Image.Image, Path | None, str]] = []
    for index, colour in enumerate(COLOURS):
        reference = tmp_path / f"{index}.png" if index != 3 else None
        if reference:
            Image.new("RGB", (400, 100), tuple(c // 2 for c in colour)).save(reference)
        cells.append((Image.new("RGB", (300, 200), colour), reference, f"picture {index}"))
    page = np.asarray(sheet(cells, columns))
    across = min(columns, 5)
    down = -(-5 // across)
    tall = 2 * (200 + MARGIN) + LINE + MARGIN
    assert page.shape == (MARGIN + down * tall, MARGIN + across * (300 + MARGIN), 3)
    for index, colour in enumerate(COLOURS):
        left, top = MARGIN + index % across * (300 + MARGIN), MARGIN + index // across * tall
        above = page[top : top + 200, left : left + 300]
        below = page[top + 200 + MARGIN : top + 400 + MARGIN, left : left + 300]
        assert (below == colour).all()
        assert (above == (255 if index == 3 else tuple(c // 2 for c in colour))).all()
        label = page[top + 2 * (200 + MARGIN) - MARGIN // 2 :, left : left + 300][: LINE + MARGIN]
        assert (label < 128).any()


def test_sizes_may_differ_and_small_ones_are_enlarged() -> None:
    cells: list[tuple[Image.Image, Path | None, str]] = [
        (Image.new("RGB", (64, 32), "red"), None, "a name that is much too long for its narrow cell, and is cut"),
        (Image.new("RGB", (32, 64), "blue"), None, "b"),
    ]
    page = np.asarray(sheet(cells, 2))
    assert page.shape == (MARGIN + 192 + MARGIN + LINE + MARGIN, MARGIN + 2 * (192 + MARGIN), 3)
    assert (page[MARGIN : MARGIN + 96, MARGIN : MARGIN + 192] == (255, 0, 0)).all()
    left = MARGIN + 192 + MARGIN
    assert (page[MARGIN : MARGIN + 192, left + 48 : left + 144] == (0, 0, 255)).all()
    assert (page[:, left - MARGIN : left] == 255).all()  # the long name stays in its cell
