"""The confined worker that expands a compressed disk. Run by `sandbox.python_command`; its caller is `rootfs/content.py`.

Called as `plaindisk JSON`, a Request: what is compressed is where `sandbox.place_input` puts number 0, the disk becomes
`/work/NAME`, with holes for zeros. On stdout one word: `disk`, or `tar` when it turned out to be an archive; then nothing
was written.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from hvctl.hostside import expand, refusal, sandbox
from hvctl.hostside.refusal import Refused, Unable
from hvctl.values import dataclass

_BLOCK_BYTES = 64 * 1024
_ZEROS = bytes(_BLOCK_BYTES)
_LOOK_BYTES = 16 * 1024**2


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to do, and how much it may come to."""

    name: str
    most_bytes: int
    ratio: int
    ratio_floor_bytes: int
    reserve_bytes: int
    """What is to stay free on the file system."""


def format_request(request: Request) -> str:
    """The worker's argument."""
    return json.dumps(asdict(request))


def main(arguments: Sequence[str]) -> None:
    """Do what the request says; ends with one of the statuses of `refusal`."""
    sys.excepthook = refusal.give_up
    request = Request(**json.loads(arguments[0]))
    path = sandbox.place_input(0)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    source = expand.Source(path, descriptor)
    blocks = _read_blocks(source.descriptor)
    head = next(blocks, b"")
    if is_tar(head):
        sys.stdout.write("tar")
        sys.stdout.flush()
        os._exit(0)  # whoever expands it finds its pipe closed
    _write(request, head, blocks, descriptor)
    source.finish()
    sys.stdout.write("disk")


def is_tar(head: bytes) -> bool:
    """Whether a file that begins so is a tar archive (POSIX's or GNU's)."""
    return head[257:262] == b"ustar"


def _write(request: Request, head: bytes, blocks: Iterator[bytes], compressed: int) -> None:
    archive_bytes, written, next_look = os.fstat(compressed).st_size, 0, 0
    most_bytes = min(request.most_bytes, max(request.ratio_floor_bytes, request.ratio * archive_bytes))
    descriptor = os.open(f"{sandbox.WORK}/{request.name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    block = head
    while block:
        if block == _ZEROS:
            os.lseek(descriptor, len(block), os.SEEK_CUR)
        else:
            view = memoryview(block)
            while view:
                view = view[os.write(descriptor, view) :]
        written += len(block)
        if written > most_bytes:
            raise Refused(f"it expands to more than {most_bytes} bytes")
        if written >= next_look:
            next_look = written + _LOOK_BYTES
            _check_space(request)
            sys.stderr.write(f"{refusal.PROGRESS}{os.lseek(compressed, 0, os.SEEK_CUR)}\n")
            sys.stderr.flush()
        block = next(blocks, b"")
    os.ftruncate(descriptor, written)
    os.close(descriptor)


def _check_space(request: Request) -> None:
    facts = os.statvfs(sandbox.WORK)
    if facts.f_bavail * facts.f_frsize < request.reserve_bytes:
        raise Unable("the file system is nearly full")


def _read_blocks(descriptor: int) -> Iterator[bytes]:
    """Full blocks, but for the last one."""
    with os.fdopen(descriptor, "rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            yield block
