"""The content of a backup on its way: a process that reads one thing, hashes it and hands it to a program; and back.

Going out (`store`): a file as it is, a qcow2 layer without the name of what it stands on, or a directory as a tar archive
with owners as they are inside. It goes to a program's stdin (zstd, restic), whose output may go to a file. A source that
fails kills that program before it could take the end for the whole.
Coming in (`load`): what a program gives, to a file with holes where zeros are, or nowhere. More than was promised ends it.

Each prints size and SHA-256 of the content as JSON. Digests are compared by whoever asked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from hvctl.hostside import files, marks, mounts, refusal
from hvctl.hostside.ids import COUNT
from hvctl.hostside.mounts import Extent
from hvctl.hostside.refusal import Refused, Unable
from hvctl.hostside.sandbox import python_words
from hvctl.hostside.tarstream import MOST_PIECES
from hvctl.values import dataclass

FILE, DISK, TREE = "file", "disk", "tree"
_CODE = Path(__file__).parents[2]
_CHUNK_BYTES = 1024**2
_HOLE_BYTES = 64 * 1024
_ZEROS = bytes(_HOLE_BYTES)
_TELL_BYTES = 16 * 1024**2
_BACKING = struct.Struct(">8xQI")  # qemu's docs/interop/qcow2.txt: offset and length of the backing file's name
_MAGIC = b"QFI\xfb"
_TAR = (
    *("tar", "--create", "--format=posix", "--no-recursion", "--null", "--verbatim-files-from", "--numeric-owner"),
    *("--xattrs", "--xattrs-include=*", "--xattrs-exclude=trusted.*"),
    *("--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime", "--file=-"),
)
# It writes its process number into the name of a file with holes; the same tree shall be the same bytes.
_SAME_NUMBER = ("unshare", "--pid", "--fork", "--kill-child", "--")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One thing that is read."""

    kind: str
    path: str
    name: str = ""
    """Of a tree: what its directory is called in the archive."""
    first_id: int = 0
    """Of a tree: the first id of the container that wrote it."""


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What has gone through."""

    size_bytes: int
    sha256: str
    left_out: int = 0
    """Device nodes that an archive does not hold."""


def store_command(source: Source, scratch: Path, program: Sequence[str], target: Path | None) -> list[str]:
    """The words that let `program` have the content, and its output go to a new file, where one is named.

    `scratch` is an empty directory of our own.
    """
    request = [dataclasses.asdict(source), str(scratch), list(program), str(target or "")]
    words = _words("store", request)
    return ["unshare", "--mount", "--propagation", "private", "--", *words] if source.kind == TREE else words


def load_command(program: Sequence[str], target: Path | None, most_bytes: int) -> list[str]:
    """The words that put what `program` prints into a new file, or only hash it."""
    return _words("load", [list(program), str(target or ""), most_bytes])


def parse(text: str) -> Moved:
    """What a process of ours has printed."""
    return Moved(**json.loads(text))


def main(arguments: Sequence[str]) -> None:
    """`store JSON` or `load JSON`; ends with one of the statuses of `refusal`."""
    sys.excepthook = refusal.give_up
    verb, request = arguments[0], json.loads(arguments[1])
    moved = _load(*request) if verb == "load" else _store(Source(**request[0]), *request[1:])
    sys.stdout.write(json.dumps(dataclasses.asdict(moved)))


def _words(verb: str, request: object) -> list[str]:
    return python_words(str(_CODE), "transfer", [verb, json.dumps(request)])


class _Progress:
    """Counts, hashes and tells."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._digest = hashlib.sha256()
        self._next_bytes = _TELL_BYTES

    def add(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self.size_bytes += len(data)
        if self.size_bytes >= self._next_bytes:
            self._next_bytes = self.size_bytes + _TELL_BYTES
            try:
                sys.stderr.write(f"{refusal.PROGRESS}{self.size_bytes}\n")
                sys.stderr.flush()
            except BrokenPipeError:  # whoever waits for the program behind us must not take it for that one's end
                raise Unable("whoever began this has gone") from None

    def end(self, left_out: int = 0) -> Moved:
        return Moved(size_bytes=self.size_bytes, sha256=self._digest.hexdigest(), left_out=left_out)


def _store(source: Source, scratch: str, program: Sequence[str], target: str) -> Moved:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    output = os.open(target, flags, 0o600) if target else 2
    progress = _Progress()
    process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=output)
    assert process.stdin is not None
    try:
        with _open(source, Path(scratch)) as (pieces, listing):
            for piece in pieces:
                progress.add(piece)
                process.stdin.write(piece)
        process.stdin.close()
    except BrokenPipeError:
        process.wait()  # it has said why
        raise Unable(f"{program[0]} ended early") from None
    except BaseException:
        process.kill()  # before it sees the end of its input
        raise
    if process.wait() != 0:
        raise Unable(f"{program[0]} failed with status {process.returncode}")
    if target:
        os.fsync(output)
    return progress.end(listing.left_out if listing else 0)


@contextlib.contextmanager
def _open(source: Source, scratch: Path) -> Iterator[tuple[Iterator[bytes], marks.Listing | None]]:
    """The content in pieces; a failure of whatever gives it is raised at the block's end."""
    if source.kind == TREE:
        with _open_tree(source, scratch) as opened:
            yield opened
        return
    descriptor = os.open(source.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", buffering=0) as stream:
        yield _read(stream, alone=source.kind == DISK), None


def _read(stream: IO[bytes], *, alone: bool) -> Iterator[bytes]:
    """Everything; `alone`: the first piece without the name of a backing file."""
    head = stream.read(_CHUNK_BYTES)
    yield _cut_off(head) if alone else head
    while data := stream.read(_CHUNK_BYTES):
        yield data


def _cut_off(head: bytes) -> bytes:
    """The header of a qcow2 file that stands alone: whoever brings it back says what it stands on there."""
    if not head.startswith(_MAGIC):
        raise Refused("it is no qcow2 file")
    offset, length = _BACKING.unpack_from(head)
    if offset + length > len(head):
        raise Refused("the name of its backing file lies outside its header")
    content = bytearray(head)
    content[offset : offset + length] = bytes(length)
    content[8:20] = bytes(12)
    return bytes(content)


@contextlib.contextmanager
def _open_tree(source: Source, scratch: Path) -> Iterator[tuple[Iterator[bytes], marks.Listing]]:
    """An archive of the directory and its marks, in a mount namespace of this process's own."""
    place, names = scratch / source.name, scratch / ".names"
    files.make_directory(place, 0o700)
    with contextlib.ExitStack() as stack:
        owners = -1
        if source.first_id:
            extents = [Extent(source.first_id, 0, COUNT)]
            owners = stack.enter_context(mounts.open_owners(extents, extents))
        mounts.bind(Path(source.path), place, owners=owners, read_only=True)
    listing = marks.Listing(place)
    (scratch / marks.NAME).write_bytes(listing.marks)
    os.utime(scratch / marks.NAME, (0, 0))
    top = os.fsencode(source.name)
    paths = [marks.NAME.encode(), top, *(top + b"/" + path for path in listing.paths[1:])]
    names.write_bytes(b"".join(path + b"\0" for path in paths))
    # A file of terabytes without content would be read for hours; but what is in too many pieces nobody could bring back.
    holes = ["--sparse"] if all(count_pieces(path) <= MOST_PIECES for path in listing.with_holes) else []
    words = [*(_SAME_NUMBER if holes else ()), *_TAR, *holes, f"--directory={scratch}", f"--files-from={names}"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield _read(process.stdout, alone=False), listing
    if process.returncode != 0:
        raise Unable(f"tar failed with status {process.returncode}")


def count_pieces(path: bytes) -> int:
    """How many pieces of content a file has, up to one more than an archive may say (lseek(2))."""
    count, end = 0, 0
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        while count <= MOST_PIECES:
            end = os.lseek(descriptor, os.lseek(descriptor, end, os.SEEK_DATA), os.SEEK_HOLE)
            count += 1
    except OSError as error:
        if error.errno != errno.ENXIO:  # there is no more
            raise
    finally:
        os.close(descriptor)
    return count


def _load(program: Sequence[str], target: str, most_bytes: int) -> Moved:
    progress = _Progress()
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(target, "xb", buffering=0)) if target else None
        process = subprocess.Popen(program, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert process.stdout is not None
        try:
            while data := process.stdout.read(_CHUNK_BYTES):
                progress.add(data)
                if progress.size_bytes > most_bytes:
                    raise Refused("it is longer than it should be")
                if file is not None:
                    _write(file, data)
        except BaseException:
            process.kill()
            raise
        if process.wait() != 0:
            raise Refused(f"{program[0]} failed with status {process.returncode}")
        if file is not None:
            os.ftruncate(file.fileno(), progress.size_bytes)
            os.fsync(file.fileno())
    return progress.end()


def _write(file: IO[bytes], data: bytes) -> None:
    """Write, leaving out blocks that are all zeros: a hole reads the same."""
    view = memoryview(data)
    for start in range(0, len(view), _HOLE_BYTES):
        piece = view[start : start + _HOLE_BYTES]
        if piece == _ZEROS[: len(piece)]:
            os.lseek(file.fileno(), len(piece), os.SEEK_CUR)
            continue
        while piece:
            piece = piece[os.write(file.fileno(), piece) :]
