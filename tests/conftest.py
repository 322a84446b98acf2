"""How the tests are dealt to processes: a file's stay together, and so do all that share the practice cluster."""

import pytest

from tests.support import ROOT

SLURM = ROOT / "tests" / "slurm"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The cluster's come first: they wait for a scheduler more than they compute."""
    items.sort(key=lambda item: SLURM not in item.path.parents)
    for item in items:
        group = SLURM if SLURM in item.path.parents else item.path
        item.add_marker(pytest.mark.xdist_group(str(group.relative_to(ROOT))))
