"""A compressed archive as a plain stream: a process without capabilities expands it into a pipe.

What it is, its first bytes say. gzip, xz and bzip2 are expanded by Python's own libraries, zstd by zstd(1), a squashfs
image by sqfs2tar(1) of squashfs-tools-ng, which makes a tar stream of it.
"""

from __future__ import annotations

import bz2
import fcntl
import lzma
import os
import signal
import sys
import zlib
from collections.abc import Callable
from typing import Protocol

from hvctl.hostside import capabilities, refusal
from hvctl.hostside.refusal import REFUSED, UNABLE, Refused, Unable

_CHUNK_BYTES = 1024**2
_XZ_MEMORY_BYTES = 256 * 1024**2
_F_SETPIPE_SZ = 1031

_MAGICS = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\0", "xz"),
    (b"BZh", "bzip2"),
    (b"hsqs", "squashfs"),
)
_PROGRAMS = {"zstd": ("zstd", "-dcq", "--memory=256MB"), "squashfs": ("sqfs2tar", "--no-skip", "--root-becomes", ".")}


class _Decoder(Protocol):
    """What Python's three libraries have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    @property
    def needs_input(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int = ..., /) -> bytes: ...


def identify(head: bytes) -> str:
    """What an archive that begins so is compressed with; empty for a plain one. A skippable zstd frame may come first."""
    if head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50:
        return "zstd"
    return next((name for magic, name in _MAGICS if head.startswith(magic)), "")


def count_inodes(descriptor: int) -> int:
    """How many entries a squashfs image says that it has (Documentation/filesystems/squashfs.rst, the superblock)."""
    return int.from_bytes(os.pread(descriptor, 4, 4), "little")


class Source:
    """An archive that is being expanded."""

    def __init__(self, path: str, descriptor: int) -> None:
        """`descriptor`: the same file, at its beginning; where it stands later tells how much has been read."""
        self._process = 0
        self._errors = -1
        self.compression = identify(os.pread(descriptor, 16, 0))
        self.descriptor = descriptor
        if self.compression:
            self.descriptor, into = os.pipe()
            self._errors, errors_into = os.pipe()
            fcntl.fcntl(into, _F_SETPIPE_SZ, _CHUNK_BYTES)
            os.set_blocking(errors_into, False)  # nobody reads it before the end: what is too much is lost
            self._process = os.fork()
            if self._process == 0:
                os.dup2(errors_into, 2)
                os.close(self.descriptor)
                _run(self.compression, path, descriptor, into)
            os.close(into)
            os.close(errors_into)

    def finish(self) -> None:
        """Call it at the end of the stream, however it looked. Raises Refused when it could not be expanded whole."""
        if not self._process:
            return
        _process, status = os.waitpid(self._process, 0)
        code = os.waitstatus_to_exitcode(status)
        if code:
            lines = os.read(self._errors, 4096).decode(errors="replace").strip().splitlines()
            reason = ascii(lines[-1])[1:-1][:200] if lines else f"status {code}"
            if code == -signal.SIGXCPU:
                raise Refused("it takes more CPU time than it may")
            if code == UNABLE:
                raise Unable(reason)
            raise Refused(f"it cannot be expanded ({self.compression}): {reason}")


def _run(compression: str, path: str, descriptor: int, into: int) -> None:
    """The process's whole life."""
    try:
        program = _PROGRAMS.get(compression)
        if program is None:
            capabilities.keep(())
            _expand(compression, descriptor, into)
            os._exit(0)
        os.dup2(descriptor, 0)
        os.dup2(into, 1)
        if compression == "squashfs":
            program = (*program, path)  # opened by name, whoever owns it
            capabilities.keep(("CAP_DAC_OVERRIDE",))
        else:
            capabilities.keep(())
        os.execvp(program[0], program)
    except FileNotFoundError:
        sys.stderr.write(f"the program {program[0] if program else ''} is not installed on this host\n")
    except BrokenPipeError:
        pass  # whoever reads has refused it
    except BaseException as error:  # noqa: BLE001  a forked process must end here
        sys.stderr.write(refusal.describe(error)[1] + "\n")
        os._exit(REFUSED)
    os._exit(UNABLE)


def _expand(compression: str, descriptor: int, into: int) -> None:
    """Every stream of the file one after the other; zeros may follow."""
    make: dict[str, Callable[[], _Decoder]] = {
        "gzip": _Gzip,
        "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES),
        "bzip2": bz2.BZ2Decompressor,
    }
    decoder = make[compression]()
    try:
        while True:
            data = os.read(descriptor, _CHUNK_BYTES)
            if not data:
                break
            while data:
                if decoder.eof:
                    data = data.lstrip(b"\0")
                    if not data:
                        break
                    decoder = make[compression]()
                data = _feed(decoder, data, into)
    except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise Refused(str(error).rpartition(": ")[2]) from error  # zlib: "Error -3 while decompressing data: ..."
    if not decoder.eof:
        raise Refused("it is cut short")


def _feed(decoder: _Decoder, data: bytes, into: int) -> bytes:
    """Expand a piece, a chunk at a time however much it becomes; gives what comes after the stream's end."""
    while True:
        found = decoder.decompress(data, _CHUNK_BYTES)
        data = b""
        view = memoryview(found)
        while view:
            view = view[os.write(into, view) :]
        if decoder.eof:
            return decoder.unused_data
        if decoder.needs_input:
            return b""


class _Gzip:
    """zlib's decoder with the manners of the other two."""

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(wbits=31)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data

    def decompress(self, data: bytes, max_length: int = 0, /) -> bytes:
        found = self._decoder.decompress(self._decoder.unconsumed_tail + data, max_length)
        self.needs_input = not self._decoder.unconsumed_tail and len(found) < max_length
        return found
