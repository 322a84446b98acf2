"""How a checkpoint gets to the disk: DCP's files with a checksum of each, and its own name when all are there."""

import errno
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.futures import Future

from synthos.train.checkpoint_files import MANIFEST, Facts, part_of, remove, sync_folder, write_counters, write_text
from synthos.train.memory import readable

FULL = (errno.ENOSPC, errno.EDQUOT)


class Writer(FileSystemWriter):
    """Writes one checkpoint under another name; rank 0 gives it its own when the files of every rank are on the disk.

    DCP calls `finish` on rank 0 after every rank has written, and raises on every rank what any of them raises. A full
    disk is an OSError of `FULL` with what was needed and what was free.

    Args:
        final: the folder's own name.
        counters: the state besides tensors, as plain JSON.
        prune: called on rank 0 once the checkpoint has its name.
    """

    def __init__(self, final: Path, counters: dict[str, Any], prune: Callable[[], None]) -> None:
        super().__init__(part_of(final), per_thread_copy_ahead=0)  # what is staged is on the CPU already
        self.final, self.counters, self.prune = final, counters, prune
        self.fs = self.files = _Files()

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On rank 0, before anyone writes: whether all of it has room."""
        needed, free = sum(map(_bytes, plans)), shutil.disk_usage(self.path).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"{readable(needed)} needed, {readable(free)} free", str(self.path))
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        """Write this rank's file; returns a future of DCP's results and the file's facts."""
        with _told(Path(self.path), _bytes(plan)):
            results = super().write_data(plan, planner).wait()
        future: Future[Any] = Future()
        future.set_result((results, dict(self.files.facts)))
        return future

    def finish(self, metadata: Metadata, results: list[Any]) -> None:
        """On rank 0, when every rank has written: list the files, make them last, and rename the folder."""
        part = Path(self.path)
        facts: Facts = {name: told for _, files in results for name, told in files.items()}
        with _told(part, sum(size for size, _ in facts.values())):
            super().finish(metadata, [own for own, _ in results])
            facts[".metadata"] = self.files.facts[".metadata.tmp"]
            write_counters(part, self.counters)
            write_text(part / MANIFEST, json.dumps(facts, indent=1))
            sync_folder(part)
        if self.final.exists():  # damaged, or it would have been restored
            remove(self.final)
        part.rename(self.final)
        sync_folder(self.final.parent)
        self.prune()


class _Files(FileSystem):
    """Keeps the facts of each file that is written."""

    def __init__(self) -> None:
        self.facts: Facts = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as file:
            stream = _Stream(cast(IO[bytes], file))
            yield stream
        self.facts[Path(path).name] = (stream.size, stream.crc)


class _Stream(io.RawIOBase):
    """A file being written from its start to its end, with the checksum of what went through."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self.crc = file, 0, 0

    def write(self, data: Any) -> int:
        self.crc = zlib.crc32(data, self.crc)
        self.size += memoryview(data).nbytes
        return self.file.write(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        if not self.file.closed:
            self.file.flush()

    def fileno(self) -> int:
        self.flush()  # who asks is about to sync
        return self.file.fileno()

    def close(self) -> None:
        super().close()
        self.file.close()


@contextmanager
def _told(path: Path, needed: int) -> Iterator[None]:
    """What goes wrong on the disk is an OSError: torch.save hides it behind one of its own. A full disk has numbers."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        told = str(cause.strerror)
        if cause.errno in FULL:
            told += f"; {readable(needed)} needed, {readable(shutil.disk_usage(path).free)} free"
        raise OSError(cause.errno, told, str(cause.filename or path)) from error


def _bytes(plan: SavePlan) -> int:
    """Of the tensors that a plan writes."""
    tensors = [item.tensor_data for item in plan.items if item.tensor_data]
    return sum(data.chunk.sizes.numel() * data.properties.dtype.itemsize for data in tensors)
