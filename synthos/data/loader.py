"""The reading processes of a rank."""

import logging
import signal
import warnings
from typing import Any

from torch.utils.data import DataLoader, Dataset

from synthos.data.processes import forkserver, usable_cores

log = logging.getLogger(__name__)


def open_loader(dataset: Dataset[Any], workers: int, tell: bool, **options: Any) -> DataLoader[Any]:
    """A loader whose readers return whole batches; 0 workers: this process reads.

    Args:
        tell: say it where there are more workers than cores.
        options: of DataLoader, on what makes a batch.
    """
    cores = usable_cores()
    if tell and workers > cores:
        log.info("data.workers: %d readers share %d cores", workers, cores)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # ours is the line above
        return DataLoader(
            dataset,
            num_workers=workers,
            collate_fn=as_is,
            multiprocessing_context=forkserver() if workers else None,
            worker_init_fn=ignore_signals if workers else None,
            **options,
        )


def as_is(batch: Any) -> Any:
    """Readers return whole batches."""
    return batch


def ignore_signals(worker: int) -> None:
    """A stop is the training process's to handle; readers that it still needs must not die of the same signal."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
