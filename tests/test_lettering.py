"""Letters in pictures: none is a box, and none stands outside of its place."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from synthos import lettering
from synthos.data.preview import Shown, draw_sheet
from synthos.lettering import letter, wrapped
from synthos.train.pictures import card

ALPHABETS = {
    "Latin-1": bytes(range(0xA1, 0x100)).decode("latin-1"),
    "Latin-2": bytes(range(0xA1, 0x100)).decode("iso8859-2"),
    "Greek": "".join(map(chr, [*range(0x391, 0x3A2), *range(0x3A3, 0x3CF)])),
    "Cyrillic": bytes(range(0xC0, 0x100)).decode("cp1251"),
}


@pytest.fixture(params=["fonts of this machine", "none"])
def fonts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "none":
        monkeypatch.setattr(lettering, "FONTS", ())


def box(text: str, font: lettering.Font) -> bool:
    unknown = font.getmask("\U0010fffe")  # of no font
    return any((m := font.getmask(c)).size == unknown.size and bytes(m) == bytes(unknown) for c in text)


@pytest.mark.usefixtures("fonts")
@pytest.mark.parametrize("text", [*ALPHABETS.values(), "猫の絵", "שלום", "🙂", "a\x85b\u200b"], ids=range(8))
def test_nothing_is_a_box(text: str) -> None:
    said, font = letter(text, 11)
    assert said and not box(said.replace("\x85", ""), font)


@pytest.mark.skipif(lettering._font("DejaVuSans.ttf", 11) is None, reason="DejaVu is not installed")
@pytest.mark.parametrize("text", ALPHABETS.values(), ids=ALPHABETS)
def test_a_font_of_this_machine_draws_what_pillows_own_lacks(text: str) -> None:
    assert box(text, ImageFont.load_default(11))
    said, font = letter(text, 11)
    assert said == text.replace("\xad", "")  # a soft hyphen, which is not seen
    assert not box(said, font)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('plain ASCII, "it\'s" 100%', 'plain ASCII, "it\'s" 100%'),
        ("café, naïve, Škoda, Ångström", "cafe, naive, Skoda, Angstrom"),
        ("a \u2012 b\u2011c", "a - b-c"),
        ("ж, łódź, 3×4", r"\u0436, \u0142odz, 3\xd74"),
        ("so\xadft\u200b", "soft"),
    ],
)
def test_without_one_accents_go_and_the_rest_is_spelt(monkeypatch: pytest.MonkeyPatch, text: str, said: str) -> None:
    monkeypatch.setattr(lettering, "FONTS", ("no such font.ttf",))
    found, font = letter(text, 11)
    assert found == said
    assert isinstance(font, ImageFont.FreeTypeFont) and font.getname()[0] == "Aileron"


def test_ascii_looks_the_same_on_every_machine() -> None:
    assert bytes(letter("abc", 14)[1].getmask("abc")) == bytes(ImageFont.load_default(14).getmask("abc"))


@pytest.mark.usefixtures("fonts")
@pytest.mark.parametrize("width", [20, 60, 184])
def test_lines_fit(width: int) -> None:
    for text in ("a few words and averyveryverylongone" * 3, ALPHABETS["Cyrillic"] * 4, "猫の絵" * 30, "  ", "w" * 999):
        said, font = letter(text, 11)
        lines = wrapped(said, font, width)
        assert all(font.getlength(line) <= width for line in lines)
        assert "".join("".join(lines).split()) == "".join(said.split())
        two = wrapped(said, font, width, 2)
        assert two == lines if len(lines) <= 2 else len(two) == 2 and two[0] == lines[0] and two[1].endswith("...")
        assert all(font.getlength(line) <= width for line in two)


@pytest.mark.usefixtures("fonts")
def test_captions_that_differ_look_different() -> None:
    def sheet(caption: str) -> bytes:
        return draw_sheet([Shown("0.tar", "a", caption, Image.new("RGB", (8, 8)), "")], 1).tobytes()

    def under(prompt: str) -> bytes:
        return card(torch.zeros(1, 3, 32, 32), None, prompt).tobytes()

    for drawn in (sheet, under):
        assert len({drawn(text) for text in ("кот", "кит", "γάτα", "chat", "猫", "絵")}) == 6
        assert drawn("кот") == drawn("кот")


def test_a_long_prompt_stands_under_its_picture_whole() -> None:
    page = np.asarray(card(torch.ones(1, 3, 256, 256), None, "words " * 60))
    assert page.shape[1] == 272 and (page[:, -8:] == 255).all() and (page[-8:] == 255).all()
    assert (page[280:] < 128).any(axis=(1, 2)).sum() > 60  # of many lines
