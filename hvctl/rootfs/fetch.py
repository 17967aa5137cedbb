"""Bringing what lies at an address: into the store's downloads, resumed, once for all who want it at the same time.

A download is named by the SHA-256 of its address, never by anything from outside, and its lock is held until the image that
is made of it is published: whoever wants the same meanwhile waits, and finds the image there. What a crash or Ctrl-C
leaves is gone on with by the next pull; `gc` removes it after a day, `image prune` at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hvctl.errors import HostError, HvctlError, Interrupted, InvalidSpec, NotFound, TimedOut, WrongState
from hvctl.events import Note, Progress
from hvctl.host import Host
from hvctl.hostside import download, files
from hvctl.hostside.download import DownloadError, Transfer
from hvctl.rootfs.building import Building, check_space
from hvctl.units import GIB, format_size
from hvctl.values import dataclass

LIMIT_BYTES = 64 * GIB
SMALL_BYTES = 4 * 1024**2
"""For what is read as text: checksums, signatures, keys."""
STALL_S = 30.0

_KEPT_S = 24 * 3600
_WAIT_S = 6 * 3600
_POLL_S = 0.2
_SUFFIXES = (".part", ".json")


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A file that was brought here: where it lies, and what is in it."""

    path: Path
    size_bytes: int
    sha256: str
    sha512: str


def is_safe(address: str) -> bool:
    """Whether nobody on the way can change what comes from there: https, this machine itself, or a file."""
    parts = urllib.parse.urlsplit(address)
    return parts.scheme in ("https", "file") or parts.hostname in ("127.0.0.1", "::1", "localhost")


def take_turn(work: Building, address: str) -> None:
    """Hold the one lock on an address until the build ends; waits for whoever has it. Raises Interrupted, WrongState."""
    host, name, waited = work.host, f"download.{_key(address)}", False
    deadline_s = time.monotonic() + _WAIT_S
    while True:
        try:
            work.held.enter_context(host.lock(name))
            return
        except WrongState:
            if time.monotonic() > deadline_s:
                raise
        if not waited:
            work.events(Note(work.name, "another hvctl is bringing this already: waiting for it"))
            waited = True
        host.pause(_POLL_S)


def bring(work: Building, address: str, *, limit_bytes: int = LIMIT_BYTES, task: str = "downloading") -> Fetched:
    """The file at an address (https, http or file), resumed where an earlier try ended; the caller has `take_turn`.

    Raises NotFound, InvalidSpec for what may not be fetched, TimedOut, HostError; what came so far is kept, but for a
    full disk.
    """
    call = work.host.shell.call
    if address.startswith("file:"):
        return measure(work, _local_path(address), limit_bytes=limit_bytes)
    call(files.make_directory, work.host.store.downloads, 0o700)
    path = work.host.store.downloads / f"{_key(address)}.part"
    work.spent.append(path)
    return _transfer(work, Transfer(address, path, limit_bytes, STALL_S), task)


def read(work: Building, address: str, *, limit_bytes: int = SMALL_BYTES) -> bytes:
    """The content of a small file at an address. Raises as `bring`."""
    if address.startswith("file:"):
        try:
            return files.read_file(_local_path(address), limit_bytes=limit_bytes)
        except FileNotFoundError as error:
            raise NotFound(f"there is no file {address!r}", hint="look for the right name") from error
    path = work.directory / f"{_key(address)}.part"
    _transfer(work, Transfer(address, path, limit_bytes, STALL_S), "reading what is there")
    try:
        content: bytes = work.host.shell.call(files.read_file, path, limit_bytes=limit_bytes)
        return content
    finally:
        work.host.shell.call(download.discard, path)


def measure(work: Building, path: Path, *, limit_bytes: int = LIMIT_BYTES) -> Fetched:
    """A file of this host, read once for its digests. Raises NotFound, InvalidSpec."""
    check_local(path, limit_bytes=limit_bytes)
    received = work.host.shell.call(download.hash_file, path, _teller(work, "reading"))
    return Fetched(path=path, size_bytes=received.size_bytes, sha256=received.sha256, sha512=received.sha512)


@contextlib.contextmanager
def hashing(work: Building, path: Path) -> Iterator[Callable[[], str]]:
    """The SHA-256 of a file of this host, found by another thread while the block works; whoever asks for it waits."""
    is_over = threading.Event()

    def look() -> None:
        if is_over.is_set():
            raise Interrupted("interrupted")

    with ThreadPoolExecutor(1) as threads:
        found = threads.submit(work.host.shell.call, files.hash_file, path, look)
        try:
            yield found.result
        finally:
            is_over.set()


def check_local(path: Path, *, limit_bytes: int = LIMIT_BYTES) -> None:
    """Raise NotFound, or InvalidSpec for what is too large, unless this is a file that can be taken."""
    if not path.is_file():
        raise NotFound(f"there is no file {str(path)!r}", hint="give the path of a disk or a root tree's archive")
    if path.stat().st_size > limit_bytes:
        raise InvalidSpec(f"{str(path)!r} is larger than {format_size(limit_bytes)}", hint="import something smaller")


def forget(work: Building, fetched: Fetched) -> None:
    """Remove a download that turned out wrong, so that the next try begins anew; a file of the user's stays."""
    if fetched.path in work.spent:
        work.host.shell.call(download.discard, fetched.path)


def collect(host: Host, *, dry_run: bool, at_once: bool) -> list[str]:
    """Remove downloads that nobody works on and that are a day old (`at_once`: of any age); a line for each."""
    call, found = host.shell.call, []
    for name in call(files.list_names, host.store.downloads):
        path = host.store.downloads / name
        if path.suffix != ".part" or host.is_busy(f"download.{path.stem}"):
            continue
        size_bytes = call(files.size, path)
        if not at_once and not call(files.is_older, path, _KEPT_S):
            continue
        if not dry_run:
            with contextlib.suppress(WrongState), host.lock(f"download.{path.stem}"):
                call(download.discard, path)
        found.append(f"download {path.stem[:12]} ({format_size(size_bytes)})")
    return found


def _transfer(work: Building, transfer: Transfer, task: str) -> Fetched:
    what = f"cannot fetch {transfer.address[:200]!r}"
    try:
        received = work.host.shell.call(download.fetch, transfer, _teller(work, task), work.host.pause)
    except DownloadError as error:
        raise _explain(error, what) from error
    except HostError as error:
        raise HostError(f"{what}: {error.message}", hint=error.hint) from error
    return Fetched(path=transfer.path, size_bytes=received.size_bytes, sha256=received.sha256, sha512=received.sha512)


def _teller(work: Building, task: str) -> download.Tell:
    """Reports bytes; refuses what will not fit before it is fetched."""
    checked = 0

    def tell(done: int, total: int) -> None:
        nonlocal checked
        work.host.pause(0)
        if total > done and total != checked and task.startswith("downloading"):
            check_space(work.host, f"downloading for {work.name!r}", total - done)
            checked = total
        work.events(Progress(work.name, task, done, total, is_bytes=True))

    return tell


def _explain(error: DownloadError, what: str) -> HvctlError:
    message, again = f"{what}: {error}", "try again: what came so far is kept"
    match error:
        case download.Missing():
            return NotFound(message, hint="look for its new address, or in the catalogue: hvctl image catalogue")
        case download.Refused():
            return InvalidSpec(
                message, hint="give another address, or fetch it yourself: hvctl image import FILE --name N"
            )
        case download.Stalled():
            return TimedOut(message, hint=again)
        case _:
            return HostError(message, hint=again)


def _key(address: str) -> str:
    return hashlib.sha256(address.encode()).hexdigest()


def _local_path(address: str) -> Path:
    parts = urllib.parse.urlsplit(address)
    if parts.netloc not in ("", "localhost"):
        raise InvalidSpec(f"{address[:200]!r} is a file of another machine", hint="file:///PATH, or its https address")
    return Path(urllib.parse.unquote(parts.path))
