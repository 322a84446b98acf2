"""What all tests have in common."""

import tempfile
from collections.abc import Iterator

import pytest


@pytest.hookimpl(trylast=True)  # once every test has its marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker is left with one while the others have nothing to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder for temporary files that ends with the tests: an agent that is killed can't remove its own."""
    tmp_path_factory.getbasetemp()  # pytest's own folder stays, with what failed
    with (
        tempfile.TemporaryDirectory(prefix="synthos-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield
