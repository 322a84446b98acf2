"""The reading processes of a rank."""

import logging
import warnings

import pytest

from synthos.data import loader
from synthos.data.loader import open_loader
from synthos.data.processes import usable_cores


@pytest.mark.parametrize(("more", "tell", "lines"), [(0, True, 0), (1, True, 1), (1, False, 0)])
def test_more_readers_than_cores_are_one_line_of_rank_0(
    caplog: pytest.LogCaptureFixture, more: int, tell: bool, lines: int
) -> None:
    """Where PyTorch would warn on each rank; no reader starts before the loader is gone through."""
    cores = usable_cores()
    with caplog.at_level(logging.INFO, loader.__name__), warnings.catch_warnings():
        warnings.simplefilter("error")
        open_loader([], cores + more, tell)  # type: ignore[arg-type]
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"data.workers: {cores + 1} readers share {cores} cores"] * lines
