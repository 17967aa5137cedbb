"""What goes on beside the thread that fills a tree: long contents are copied, and what is there is brought to the disk.

Both are system calls that take long and leave Python to others meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from hvctl.hostside.files import sync_file_system

_MOST_WAITING = 16


class Tasks:
    """Done by one other thread, in the order in which they come. It may do what the thread may that gave the first."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._places = threading.BoundedSemaphore(_MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def are_waiting(self) -> bool:
        return not self._waiting.empty()

    def add(self, task: Callable[[], None]) -> None:
        """Have something done, later; waits while many wait. Raises what an earlier task raised."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        self._places.acquire()
        self._check()
        self._waiting.put(task)

    def finish(self) -> None:
        """Wait until all is done. Raises what a task raised."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
            self._thread = None
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while (task := self._waiting.get()) is not None:
            try:
                if self._failure is None:
                    task()
            except BaseException as failure:  # noqa: BLE001  raised where somebody sees it
                self._failure = failure
            self._places.release()


class Flusher:
    """Brings a file system to the disk while more is written to it, so that less is left to wait for in the end."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._tasks = Tasks()

    def begin(self) -> None:
        """Have it done, unless that is to be done anyway. Raises OSError for what could not be written before."""
        if not self._tasks.are_waiting:
            self._tasks.add(partial(sync_file_system, self._path))

    def finish(self) -> None:
        """Wait for what was begun. Raises OSError: the kernel tells of a failed write once, and nobody hears of it again."""
        self._tasks.finish()
