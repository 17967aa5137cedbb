"""The confined worker that applies archives to a tree. Run by `sandbox.python_command`; its caller is `rootfs/intake.py`.

Called as `unpack JSON`, a Request: the tree is `/work`, archives are where `sandbox.place_input` puts them. Each archive
is checked against its digest first, then applied by a process whose root is the tree and that may do nothing but write
files of any owner. On stderr: progress (`refusal.PROGRESS`), then one line when it fails. On stdout: a Report.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
import stat
import sys
from collections.abc import Sequence

from hvctl.hostside import capabilities, expand, refusal, sandbox
from hvctl.hostside.beside import Flusher
from hvctl.hostside.bytestream import Stream
from hvctl.hostside.refusal import Refused, Unable
from hvctl.hostside.tarstream import read_entries
from hvctl.hostside.treewriter import Tree
from hvctl.values import dataclass

CAPABILITIES = (*sandbox.WRITE_ANY_OWNER, "CAP_SYS_CHROOT")
_LOOK_BYTES = 16 * 1024**2
_FLUSH_BYTES = 64 * 1024**2
_LOOK_ENTRIES = 4096
_LEAST_INODES = 1024


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What all archives of one tree may come to."""

    entries: int
    expanded_bytes: int
    ratio: int
    """Expanded bytes for each byte of an archive, counted from `ratio_floor_bytes` on."""
    ratio_floor_bytes: int
    depth: int
    path_bytes: int
    reserve_bytes: int
    """What is to stay free on the file system."""


@dataclass(frozen=True, kw_only=True)
class Archive:
    """One archive; digests are SHA-256 in hex, empty when nobody knows them."""

    sha256: str = ""
    """Of the file."""
    expanded_sha256: str = ""
    """Of the tar stream in it."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to do."""

    archives: tuple[Archive, ...]
    bounds: Bounds
    has_whiteouts: bool
    """Whether they are layers of an OCI image, each upon the last."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What has come of it."""

    entries: int = 0
    archive_bytes: int = 0
    expanded_bytes: int = 0
    peak_bytes: int = 0
    """The most memory that one of its processes took."""


def format_request(request: Request) -> str:
    """The worker's argument."""
    return json.dumps(dataclasses.asdict(request))


def parse_request(text: str) -> Request:
    """And back."""
    data = json.loads(text)
    return Request(
        archives=tuple(Archive(**archive) for archive in data["archives"]),
        bounds=Bounds(**data["bounds"]),
        has_whiteouts=data["has_whiteouts"],
    )


def main(arguments: Sequence[str]) -> None:
    """Do what the request says; ends with one of the statuses of `refusal`."""
    sys.excepthook = refusal.give_up
    request = parse_request(arguments[0])
    report = Report()
    for number, archive in enumerate(request.archives):
        job = _Job(request, number, report)
        if archive.sha256:
            job.check_digest()
        report = _in_child(job)
        os.close(job.descriptor)
    # ru_maxrss counts KiB (getrusage(2)).
    peak_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    report = dataclasses.replace(report, peak_bytes=peak_bytes)
    sys.stdout.write(json.dumps(dataclasses.asdict(report)))


def _in_child(job: _Job) -> Report:
    """What has come of a job that another process did; ends with its status where that fails."""
    answer, into = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.write(into, json.dumps(dataclasses.asdict(job.run())).encode())
            os._exit(0)
        except BaseException as error:  # noqa: BLE001  a forked process must end here
            refusal.give_up(type(error), error, None)
    os.close(into)
    with os.fdopen(answer, "rb") as stream:
        text = stream.read()
    _process, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        os._exit(code if code > 0 else 128 - code)
    return Report(**json.loads(text))


class _Job:
    """One archive to apply."""

    def __init__(self, request: Request, number: int, before: Report) -> None:
        self._request, self._bounds, self._archive = request, request.bounds, request.archives[number]
        self._name = f"layer {number + 1} of {len(request.archives)}: " if len(request.archives) > 1 else ""
        self._path = sandbox.place_input(number)
        self.descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(self.descriptor).st_mode):
            raise Refused(f"{self._name}it is no regular file")
        self._is_upper = request.has_whiteouts and number > 0
        self._before = before
        self._entries, self._content_bytes = before.entries, before.expanded_bytes
        self._archive_bytes = os.fstat(self.descriptor).st_size
        self._next_look_bytes = 0
        self._next_flush_bytes = _FLUSH_BYTES
        self._flusher = Flusher("/")
        self._inodes = 0
        """Of a squashfs image, as it says: another process reads it, nobody here sees how far."""

    def check_digest(self) -> None:
        with os.fdopen(os.dup(self.descriptor), "rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        os.lseek(self.descriptor, 0, os.SEEK_SET)
        if found != self._archive.sha256:
            raise Refused(f"{self._name}its digest is sha256:{found}, not sha256:{self._archive.sha256}")

    def run(self) -> Report:
        """Apply it; this process can do nothing else afterwards."""
        try:
            return self._run()
        except (Refused, Unable) as error:
            raise type(error)(f"{self._name}{error}") from error

    def _run(self) -> Report:
        source = expand.Source(self._path, self.descriptor)
        if source.compression == "squashfs":
            self._inodes = expand.count_inodes(self.descriptor)
        os.chroot(sandbox.WORK)
        os.chdir("/")
        os.umask(0)
        capabilities.keep(sandbox.WRITE_ANY_OWNER)
        stream = Stream(source.descriptor, self._count_bytes, has_digest=bool(self._archive.expanded_sha256))
        tree = Tree(depth=self._bounds.depth, path_bytes=self._bounds.path_bytes, is_upper=self._is_upper)
        try:
            self._apply(stream, tree)
            digest = stream.finish()
        except Refused:
            if stream.is_at_end:
                source.finish()  # knows better why
            raise
        source.finish()
        tree.close()
        self._flusher.finish()
        if self._archive.expanded_sha256 not in ("", digest):
            raise Refused(f"its content's digest is sha256:{digest}, not sha256:{self._archive.expanded_sha256}")
        return Report(
            entries=self._entries,
            archive_bytes=self._before.archive_bytes + self._archive_bytes,
            expanded_bytes=self._before.expanded_bytes + stream.total_bytes,
        )

    def _apply(self, stream: Stream, tree: Tree) -> None:
        has_digest = bool(self._archive.sha256 or self._archive.expanded_sha256)
        for entry in read_entries(stream, needs_end=not has_digest):
            self._entries += 1
            if self._entries > self._bounds.entries:
                raise Refused(f"it has more than {self._bounds.entries} entries")
            if self._entries % _LOOK_ENTRIES == 0:
                self._check_space()
            self._content_bytes += entry.full_size
            if self._content_bytes > self._bounds.expanded_bytes:
                raise Refused(f"it expands to more than {self._bounds.expanded_bytes} bytes")
            if not (self._request.has_whiteouts and tree.white_out(entry)):
                tree.add(entry, stream)
            elif entry.size:
                stream.copy(entry.size, None)

    def _count_bytes(self, total_bytes: int) -> None:
        if total_bytes < self._next_look_bytes:
            return
        self._next_look_bytes = total_bytes + _LOOK_BYTES
        if self._before.expanded_bytes + total_bytes > self._bounds.expanded_bytes:
            raise Refused(f"it expands to more than {self._bounds.expanded_bytes} bytes")
        if total_bytes > max(self._bounds.ratio_floor_bytes, self._bounds.ratio * self._archive_bytes):
            raise Refused(f"it expands to more than {self._bounds.ratio} times its size")
        self._check_space()
        if total_bytes >= self._next_flush_bytes:
            self._next_flush_bytes = total_bytes + _FLUSH_BYTES
            self._flusher.begin()
        read = os.lseek(self.descriptor, 0, os.SEEK_CUR)
        if self._inodes:
            read = self._archive_bytes * min(self._entries, self._inodes) // self._inodes
        sys.stderr.write(f"{refusal.PROGRESS}{self._before.archive_bytes + read}\n")
        sys.stderr.flush()

    def _check_space(self) -> None:
        facts = os.statvfs("/")
        if facts.f_bavail * facts.f_frsize < self._bounds.reserve_bytes:
            raise Unable("the file system is nearly full")
        if facts.f_files and facts.f_favail < _LEAST_INODES:
            raise Unable("the file system has nearly no inodes left")
