"""Pictures for people: what was asked for and what came, on one card."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from synthos.lettering import letter, wrapped

MARGIN = 8  # pixels
LINE = 18  # pixels that a line of text takes
SIZE = 14  # of letters


def to_image(picture: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] as an 8-bit picture."""
    array = (picture.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(array.cpu().numpy())


def card(pictures: Tensor, reference: Path | None, prompt: str) -> Image.Image:
    """Reference and generated pictures [P, 3, H, W] side by side, the prompt under them; small ones are enlarged."""
    made = [to_image(picture) for picture in pictures]
    tiles = [_like(Image.open(reference), made[0]), *made] if reference else made
    scale = max(1, 256 // made[0].height)
    tiles = [t.resize((t.width * scale, t.height * scale), Image.Resampling.NEAREST) for t in tiles]
    sheet_width = sum(t.width + MARGIN for t in tiles) + MARGIN
    text, font = letter(prompt or "(no prompt)", SIZE)
    lines = wrapped(text, font, sheet_width - 2 * MARGIN)
    sheet = Image.new("RGB", (sheet_width, tiles[0].height + 2 * MARGIN + LINE * len(lines) + MARGIN), "white")
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (MARGIN + index * (tile.width + MARGIN), MARGIN))
    for number, line in enumerate(lines):
        ImageDraw.Draw(sheet).text((MARGIN, tiles[0].height + 2 * MARGIN + LINE * number), line, "black", font)
    return sheet


def grid(rows: list[list[Tensor]], gap: int = 4, scale: int = 1) -> Image.Image:
    """Pictures [3, H, W] of one size in rows and columns."""
    height, width = rows[0][0].shape[-2:]
    columns = max(len(row) for row in rows)
    sheet = np.full((len(rows) * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            top, left = gap + y * (height + gap), gap + x * (width + gap)
            sheet[top : top + height, left : left + width] = np.asarray(to_image(picture))
    image = Image.fromarray(sheet)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def sheet(cells: list[tuple[Image.Image, Path | None, str]], columns: int) -> Image.Image:
    """Pictures in rows of `columns`, each with its name under it and, where any has one, its reference above it.

    Args:
        cells: picture, reference file, name. Pictures may differ in size: each is centred in its cell.
        columns: at most so many pictures in a row; small pictures are enlarged.
    """
    width, height = max(p.width for p, _, _ in cells), max(p.height for p, _, _ in cells)
    scale = max(1, 192 // height)
    levels = 2 if any(reference for _, reference, _ in cells) else 1
    cell = (width * scale + MARGIN, levels * (height * scale + MARGIN) + LINE + MARGIN)
    columns = min(columns, len(cells))
    page = Image.new("RGB", (columns * cell[0] + MARGIN, -(-len(cells) // columns) * cell[1] + MARGIN), "white")
    for index, (picture, reference, name) in enumerate(cells):
        left, top = MARGIN + index % columns * cell[0], MARGIN + index // columns * cell[1]
        tiles = [picture] if levels == 1 else [_like(Image.open(reference), picture) if reference else None, picture]
        for tile in tiles:
            if tile:
                shown = tile.resize((tile.width * scale, tile.height * scale), Image.Resampling.NEAREST)
                page.paste(shown, (left + (cell[0] - MARGIN - shown.width) // 2, top))
            top += height * scale + MARGIN
        name, font = letter(name, SIZE)
        while font.getlength(name) > cell[0] - MARGIN:
            name = name[:-1]
        middle = left + (cell[0] - MARGIN - font.getlength(name)) // 2
        ImageDraw.Draw(page).text((middle, top - MARGIN // 2), name, fill="black", font=font)
    return page


def _like(reference: Image.Image, made: Image.Image) -> Image.Image:
    """The reference resized to cover, and centre-cropped to, the size of the generated picture."""
    from PIL import ImageOps

    return ImageOps.fit(ImageOps.exif_transpose(reference).convert("RGB"), made.size, Image.Resampling.LANCZOS)
