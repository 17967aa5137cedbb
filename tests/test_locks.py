"""Locks, and the programs that are started while they are held."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from hvctl.hostside import locks
from hvctl.shell import LocalShell


def test_a_program_that_outlives_us_still_holds_the_lock(tmp_path: Path) -> None:
    path, told = tmp_path / "lock", tmp_path / "told"
    os.mkfifo(told)
    process = os.fork()
    if process == 0:
        with locks.hold(path, timeout_s=0):
            LocalShell().run(["sh", "-c", f"kill -KILL {os.getpid()}; cat {told}"], timeout_s=60)
        os._exit(0)
    os.waitpid(process, 0)
    with pytest.raises(BlockingIOError), locks.hold(path, timeout_s=0):
        pass
    told.write_text("end")
    with locks.hold(path, timeout_s=60):
        pass


def test_a_program_is_started_while_other_threads_let_go_of_their_locks(tmp_path: Path) -> None:
    """Many creates in one process: a descriptor that was closed meanwhile failed the program's start."""
    done = threading.Event()

    def take_and_let_go(name: str) -> None:
        while not done.is_set():
            with locks.hold(tmp_path / name, timeout_s=0):
                done.wait(0.001)
            done.wait(0.001)

    threads = [threading.Thread(target=take_and_let_go, args=(str(number),)) for number in range(16)]
    for thread in threads:
        thread.start()
    try:
        for _start in range(100):
            LocalShell().run(["true"], timeout_s=60)
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_who_holds_a_lock_knows(tmp_path: Path) -> None:
    path, seen = tmp_path / "lock", []
    assert not locks.is_mine(path)
    with locks.hold(path, timeout_s=0), locks.hold(tmp_path / "other", timeout_s=0):
        other = threading.Thread(target=lambda: seen.append(locks.is_mine(path)))
        other.start()
        other.join()
        assert (locks.is_mine(path), seen) == (True, [False])
    assert not locks.is_mine(path)
