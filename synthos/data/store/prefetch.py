"""A thread that brings the next shards while the ones before are read."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable

from synthos.data.store.retry import NoRoom, StorageError

log = logging.getLogger(__name__)
CLOSE_SECONDS = 10.0


class Prefetcher:
    """Calls `bring` for one URL after the other, in the background.

    What fails here is only logged: who needs the shard asks for it again and meets the failure itself.

    Args:
        bring: brings one URL; what it waits for ends when the event is set.
    """

    def __init__(self, bring: Callable[[str, threading.Event], object]) -> None:
        self.bring = bring
        self.stop = threading.Event()
        self._next: deque[str] = deque()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def want(self, urls: Iterable[str]) -> None:
        """Bring these, in this order, in place of those that were not begun."""
        with self._changed:
            self._next = deque(urls)
            self._changed.notify()

    def close(self) -> None:
        """Stop after the request that is under way."""
        self.stop.set()
        self.want([])
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while (url := self._take()) is not None:
            try:
                self.bring(url, self.stop)
            except NoRoom as error:
                log.info("not brought ahead of use: %s", error)
                self.want([])
            except (StorageError, OSError, ValueError) as error:
                log.info("not brought ahead of use: %s", error)

    def _take(self) -> str | None:
        """The next URL, waited for; None when there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._next or self.stop.is_set())
            return None if self.stop.is_set() else self._next.popleft()
