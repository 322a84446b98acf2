"""What all tests have in common."""

import atexit
import shutil
import tempfile
from collections.abc import Iterator

import pytest

# A folder for temporary files that ends with this process; by being registered this early it does so after
# multiprocessing has removed its own there.
TEMPORARY = tempfile.mkdtemp(prefix="synthos-")
atexit.register(shutil.rmtree, TEMPORARY, ignore_errors=True)


@pytest.hookimpl(trylast=True)  # once every test has its marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker is left with one while the others have nothing to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All temporary files go into that folder: an agent that is killed can't remove its own."""
    tmp_path_factory.getbasetemp()  # pytest's own folder stays, with what failed
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", TEMPORARY)
        patch.setattr(tempfile, "tempdir", TEMPORARY)
        yield
