"""Keyed randomness: golden values, independence of layout, and the distributions themselves."""

import math

import pytest
import torch

from synthos.keys import FixedDraws, KeyedDraws, hash64, sample_id, signed64


def test_golden_values() -> None:
    """Changing the keying changes every run: these numbers may only change with a note in the CHANGELOG."""
    assert hash64(1, "a", b"a") == GOLDEN[0]
    assert sample_id("photos", "00000.tar", "000000001") == GOLDEN[1]
    draws = KeyedDraws(3, torch.tensor([5, -7]), torch.tensor([0, 2]))
    assert draws.uniform("t").tolist() == pytest.approx(GOLDEN[2], abs=1e-15)
    assert draws.normal("noise", (2,)).flatten().tolist() == pytest.approx(GOLDEN[3], abs=1e-6)


GOLDEN = (
    6568454806733423141,
    10602362368077419316,
    [0.33698235621475153, 0.7058124615745043],
    [0.2923295, 0.86386, 0.5115983, -0.0897277],
)


def test_parts_of_a_key_do_not_run_together() -> None:
    keys = [
        hash64("ab", "c"),
        hash64("a", "bc"),
        hash64("abc"),
        hash64(b"abc"),
        hash64("ab", "c", ""),
        hash64(1, 2),
        hash64(12),
    ]
    assert len(set(keys)) == len(keys)


def test_a_sample_meets_the_same_numbers_in_any_batch() -> None:
    ids, epochs = torch.arange(8) * 7919, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    whole = KeyedDraws(0, ids, epochs)
    for rows in ([5], [7, 0, 3], list(range(4, 8))):
        part = KeyedDraws(0, ids[rows], epochs[rows])
        assert torch.equal(part.normal("noise", (3, 5)), whole.normal("noise", (3, 5))[rows])
        assert torch.equal(part.uniform("t"), whole.uniform("t")[rows])


@pytest.mark.parametrize(("seed", "sample", "epoch", "draw"), [(1, 4, 0, 0), (0, 5, 0, 0), (0, 4, 1, 0), (0, 4, 0, 1)])
def test_every_part_of_the_key_matters(seed: int, sample: int, epoch: int, draw: int) -> None:
    draws = KeyedDraws(0, torch.tensor([4]), torch.tensor([0]))
    other = KeyedDraws(seed, torch.tensor([sample]), torch.tensor([epoch]), draw=draw)
    assert not torch.equal(draws.normal("n", (4,)), other.normal("n", (4,)))
    assert draws.uniform("t") != other.uniform("t") and draws.uniform("t") != draws.uniform("s")


def test_distributions() -> None:
    draws = KeyedDraws(0, torch.arange(20000), torch.zeros(20000, dtype=torch.int64))
    u, n = draws.uniform("t"), draws.normal("noise", (1,))
    assert u.min() >= 0 and u.max() < 1
    # Kolmogorov-Smirnov distances; 1.63 / sqrt(n) is the 1 % bound.
    grid = torch.arange(1, 20001) / 20000
    assert (u.sort().values - grid).abs().max() < 1.63 / math.sqrt(20000)
    cdf = 0.5 * (1 + torch.erf(n.flatten().sort().values / math.sqrt(2)))
    assert (cdf - grid).abs().max() < 1.63 / math.sqrt(20000)


def test_fixed_draws_are_a_grid_that_never_drops() -> None:
    ids = torch.tensor([3, 3, 9])
    draws = FixedDraws(0, ids, [0, 7, 3])
    assert draws.uniform("t").tolist() == [0.0625, 0.9375, 0.4375]
    assert (draws.uniform("drop_text") >= 1).all()
    noise = draws.normal("noise", (4,))
    assert not torch.equal(noise[0], noise[1])  # noise of its own at each time
    assert torch.equal(FixedDraws(0, ids[2:], [3]).normal("noise", (4,))[0], noise[2])


def test_signed64_keeps_the_bits() -> None:
    for value in (0, 1, 2**63 - 1, 2**63, 2**64 - 1):
        assert signed64(value) % 2**64 == value and -(2**63) <= signed64(value) < 2**63
