"""data=photos: the colour photographs in scikit-image's wheel, cut into captioned crops of 64 x 64 pixels.

Three data sets that share no pixel: `train` from the left 70 % of six photographs, `region` from the right 30 % of the
same, and `photo` from two others. A caption tells what can be measured: the photograph, the place in it, the colour of
each quarter, brightness, contrast and scale, in two to five sentences.

Whoever changes what the crops show or say raises the number in the folder's name in configs/data/photos.yaml: a folder
that is there is taken as it is.
"""

import colorsys
import importlib.util
import io
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from synthos.data.write import Row, write_shards
from synthos.keys import hash64

SIZE = 64  # pixels of a crop
SIDES = (64, 96)  # pixels of the photograph that it may show
CONTRAST = 12  # least deviation, in grey levels, of the means of its 4 x 4 parts: a flat crop has no layout to learn
LEFT = 0.7  # of each photograph's width is trained on
SUBJECTS = {
    "astronaut.png": "the astronaut",
    "chelsea.png": "the cat Chelsea",
    "hubble_deep_field.jpg": "the Hubble deep field",
    "retina.jpg": "the retina",
    "ihc.png": "the stained tissue",
    "motorcycle_left.png": "the motorcycle",  # motorcycle_right shows nearly the same pixels, so it is left out
    "coffee.png": "the cup of coffee",
    "rocket.jpg": "the rocket",
}
UNSEEN = ("coffee.png", "rocket.jpg")
SEEN = tuple(name for name in SUBJECTS if name not in UNSEEN)
SPLITS = {  # name -> photographs, part of their width, crops of each
    "train": (SEEN, (0.0, LEFT), 500),
    "region": (SEEN, (LEFT, 1.0), 8),
    "photo": (UNSEEN, (0.0, 1.0), 20),
}
HUES = ((15, "red"), (45, "orange"), (70, "yellow"), (165, "green"), (200, "cyan"), (260, "blue"), (300, "purple"),
        (340, "pink"), (361, "red"))  # fmt: skip

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def prepare(folder: Path) -> None:
    """Write the three data sets below `folder`, unless it is there; it appears when they are finished.

    Raises ValueError if scikit-image or one of its photographs is not there.
    """
    if folder.is_dir():
        return
    photos = _load_photos()
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        for split in SPLITS:
            write_shards(part / split, crops(split, photos))
        _publish(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def missing() -> list[str]:
    """One line if scikit-image or some of its photographs are not there, else none; nothing is imported or read."""
    paths = _paths()
    if not paths:
        return ["data=photos is cut from scikit-image's photographs: pip install -e '.[demo]'"]
    absent = [name for name, path in paths.items() if not path.is_file()]
    return [f"data=photos: this scikit-image lacks {', '.join(absent)}: pip install -e '.[demo]'"] if absent else []


def crops(split: str, photos: dict[str, Image.Image]) -> Iterator[Row]:
    """The samples of one split, the photographs taking turns."""
    names, part, count = SPLITS[split]
    for number in range(count):
        for name in names:
            photo = photos[name]
            box, crop = _draw_crop(photo, part, f"{split} {name} {number}")
            place = _place(box, photo)
            caption = _caption(np.asarray(crop), SUBJECTS[name], place, box, sentences=2 + hash64(split, *box) % 4)
            yield Row(_jpeg(crop), caption, {"photo": name, "region": place, "box": list(box)})


def _load_photos() -> dict[str, Image.Image]:
    if lines := missing():
        raise ValueError(lines[0])
    return {name: Image.open(path).convert("RGB") for name, path in _paths().items()}


def _paths() -> dict[str, Path]:
    """Where each photograph would lie in the installed scikit-image; empty if there is none."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        return {}
    folder = Path(spec.submodule_search_locations[0]) / "data"
    return {name: folder / name for name in SUBJECTS}


def _publish(part: Path, folder: Path) -> None:
    try:
        part.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first, with the same bytes
            raise


def _draw_crop(photo: Image.Image, part: tuple[float, float], key: str) -> tuple[Box, Image.Image]:
    """The first of a row of random squares that shows something; a pure function of `key`."""
    for attempt in itertools.count():
        box = _draw_box(photo, part, f"{key} {attempt}")
        crop = photo.crop(box).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        parts = np.asarray(crop.convert("L").resize((4, 4), Image.Resampling.BOX), np.float64)
        if parts.std() >= CONTRAST:
            break
    return box, crop


def _draw_box(photo: Image.Image, part: tuple[float, float], key: str) -> Box:
    """A square within a part of the photograph's width; a pure function of `key`."""
    left, right = (int(photo.width * edge) for edge in part)
    largest = min(SIDES[1], right - left, photo.height)
    side = SIDES[0] + hash64("photos", key, "side") % (largest - SIDES[0] + 1)
    x = left + hash64("photos", key, "x") % (right - left - side + 1)
    y = hash64("photos", key, "y") % (photo.height - side + 1)
    return x, y, x + side, y + side


def _caption(pixels: NDArray[np.uint8], subject: str, place: str, box: Box, sentences: int) -> str:
    half = SIZE // 2
    quarters = [pixels[:half, :half], pixels[:half, half:], pixels[half:, :half], pixels[half:, half:]]
    first, second, third, fourth = (color_name(quarter.mean((0, 1))) for quarter in quarters)
    grey = pixels.mean(2)
    brightness = ("dark", "dim", "bright", "very bright")[int(np.digitize(grey.mean(), (50, 100, 170)))]
    contrast = ("low", "medium", "high")[int(np.digitize(grey.std(), (20, 50)))]
    told = [
        f"A piece of the photograph of {subject}, from its {place}.",
        f"The top left is {first}, the top right {second}, the bottom left {third} and the bottom right {fourth}.",
        f"As a whole it is {brightness}.",
        f"Its contrast is {contrast}.",
        f"It shows {box[2] - box[0]} pixels of the photograph from side to side.",
    ]
    return " ".join(told[:sentences])


def color_name(rgb: NDArray[np.float64]) -> str:
    """An everyday name of a colour, 0 to 255 each."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(rgb / 255).tolist())
    if value < 0.12:
        return "black"
    if saturation < 0.15:
        return "dark grey" if value < 0.4 else "grey" if value < 0.7 else "light grey" if value < 0.9 else "white"
    name = next(name for limit, name in HUES if 360 * hue < limit)
    if name == "orange" and value < 0.65:
        name = "brown"
    if name == "red" and saturation < 0.5 <= value:
        return "pink"
    return f"dark {name}" if value < 0.4 else f"pale {name}" if saturation < 0.5 else name


def _place(box: Box, photo: Image.Image) -> str:
    """Which ninth of the photograph the middle of the box lies in."""
    column = (box[0] + box[2]) * 3 // (2 * photo.width)
    row = (box[1] + box[3]) * 3 // (2 * photo.height)
    return f"{('upper', 'middle', 'lower')[row]} {('left', 'centre', 'right')[column]}"


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()
