"""Dealing slots to sources, against counting and against exact shares."""

from fractions import Fraction

import numpy as np
import pytest

from synthos.data.mixture import BITS, Mixture, weight_schedule
from synthos.schema import SourceConfig

WEIGHTS = [[1.0], [1, 1], [0.7, 0.3], [5, 3, 2], [1, 1, 1, 1], [0.9, 0.05, 0.05], [100, 1, 1, 1, 1, 50, 7]]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_each_source_takes_its_samples_in_order(weights: list[float]) -> None:
    mixture = Mixture({0: weights})
    sources, numbers = mixture.deal(np.arange(5000))
    seen = [0] * len(weights)
    for slot, (source, number) in enumerate(zip(sources.tolist(), numbers.tolist(), strict=True)):
        assert number == seen[source]
        seen[source] += 1
        if slot % 97 == 0:
            assert mixture.counts(slot + 1) == seen
    far = np.array([3, 70, 71, 4999])  # any slots, without those before them
    np.testing.assert_array_equal(mixture.deal(far), [sources[far], numbers[far]])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_shares_are_exact_to_a_sample_or_so(weights: list[float]) -> None:
    """Within 1 up to four sources, and within 2 for seven of very different weight; so each batch is stratified."""
    sources, _ = Mixture({0: weights}).deal(np.arange(20_000))
    limit = 1 if len(weights) <= 4 else 2
    for source, weight in enumerate(weights):
        share = Fraction(weight) / sum(map(Fraction, weights))
        served = np.cumsum(sources == source)
        wanted = np.arange(1, 20_001) * float(share)
        rounding = 20_000 * 2.0**-BITS * len(weights)
        assert np.abs(served - wanted).max() <= limit + rounding
        per_batch = np.bincount(np.arange(20_000) // 100, weights=sources == source)
        assert np.abs(per_batch - 100 * float(share)).max() <= 2 * limit


def test_weights_change_at_their_slot() -> None:
    mixture = Mixture({0: [1, 0], 100: [0, 1], 150: [1, 1]})
    sources, numbers = mixture.deal(np.arange(250))
    assert not sources[:100].any() and sources[100:150].all() and abs(sources[150:].sum() - 50) <= 1
    assert numbers[:100].tolist() == list(range(100)) and numbers[100:150].tolist() == list(range(50))
    assert mixture.counts(250) == [(sources == 0).sum(), (sources == 1).sum()]
    np.testing.assert_array_equal(mixture.deal(np.array([120, 200])), [sources[[120, 200]], numbers[[120, 200]]])


def test_late_slots_are_exact() -> None:
    """At 10^11 samples nothing overflows."""
    mixture, late = Mixture({0: [0.3, 0.7]}), 10**11
    before, after = mixture.counts(late), mixture.counts(late + 1000)
    sources, numbers = mixture.deal(np.arange(late, late + 1000))
    assert sum(before) == late and [a - b for a, b in zip(after, before, strict=True)] == np.bincount(sources).tolist()
    assert numbers[sources == 1].tolist() == list(range(before[1], after[1]))


def test_a_schedule_by_steps_and_the_weight_of_size() -> None:
    mix = {"a": SourceConfig("a/"), "b": SourceConfig("b/", {"0": 2.0, "50": 8.0})}
    assert weight_schedule(mix, [10, 30]) == {0: [10.0, 2.0], 50: [10.0, 8.0]}
    assert weight_schedule(None, [10]) == {0: [1.0]}


@pytest.mark.parametrize(
    "weight, fault",
    [
        (-1.0, r"data\.mix\.b\.weight: -1\.0 is not allowed; expected 0 or more"),
        (float("nan"), r"data\.mix\.b\.weight: nan is not allowed"),
        ({"5": 1.0}, r"data\.mix\.b\.weight: .*expected steps and weights that begin at 0"),
        ({"0": 1.0, "x": 1.0}, r"data\.mix\.b\.weight: .*expected steps and weights"),
    ],
)
def test_wrong_weights(weight: float | dict[str, float], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        weight_schedule({"a": SourceConfig("a/", 1.0), "b": SourceConfig("b/", weight)}, [1, 1])


def test_all_zero_weights() -> None:
    mix = {"a": SourceConfig("a/", {"0": 1.0, "9": 0.0}), "b": SourceConfig("b/", 0.0)}
    with pytest.raises(ValueError, match="every weight is 0 from step 9 on"):
        weight_schedule(mix, [1, 1])
