"""What a step waited for."""

import re

import pytest

from synthos.train.waiting import advise, waits


def test_a_wait_is_split_by_what_readers_did() -> None:
    found = waits(waited=2.0, moved=0.5, seconds=10.0, readers={"fetch": 6.0, "read": 1.0, "decode": 3.0})
    assert found == {
        "data/wait_s": 2.5,
        "data/wait": 0.25,
        "data/wait_fetch_s": pytest.approx(1.2),
        "data/wait_read_s": pytest.approx(0.2),
        "data/wait_decode_s": pytest.approx(0.6),
        "data/wait_transfer_s": 0.5,
    }
    parts = [value for name, value in found.items() if name.startswith("data/wait_") and name != "data/wait_s"]
    assert sum(parts) == pytest.approx(found["data/wait_s"])


def test_nothing_is_known_of_readers_that_tell_nothing() -> None:
    assert waits(1.0, 0.0, 2.0, {}) == {"data/wait_s": 1.0, "data/wait": 0.5, "data/wait_transfer_s": 0.0}


@pytest.mark.parametrize(
    ("share", "parts", "word"),
    [
        (0.05, {"data/wait_fetch_s": 1.0}, ""),
        (0.2, {"data/wait_fetch_s": 0.1, "data/wait_decode_s": 0.3}, "20% of the time .* mostly for decoding"),
        (0.06, {"data/wait_transfer_s": 0.3, "data/wait_decode_s": 0.1}, "mostly for moving batches to the device"),
        (0.5, {}, ""),
    ],
)
def test_advice(share: float, parts: dict[str, float], word: str) -> None:
    line = advise(share, parts)
    assert re.search(word, line) if word else line == ""
