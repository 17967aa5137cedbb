"""What comes from outside, taken in by confined workers: archives into trees, disks into clean qcow2 files.

Everything that reads a foreign archive, disk or file system goes through here. The worker sees its own directory, the
input and the system's programs, has no network and works under limits (`hostside/sandbox.py`); what it refuses is one
line. A failure leaves the target behind half-done: whoever gave it removes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from hvctl.errors import CommandFailed, HostError, HvctlError, InvalidSpec
from hvctl.events import Progress, Sink, ignore
from hvctl.host import Host
from hvctl.hostside import files, inroot, qcow2, refusal, sandbox, unpack
from hvctl.rootfs import confined
from hvctl.rootfs.confined import DEFAULTS, Limits, run_confined
from hvctl.shell import Completed
from hvctl.units import format_size
from hvctl.values import dataclass

__all__ = [
    "DiskFacts",
    "Layer",
    "Limits",
    "check_disk",
    "convert_disk",
    "read_in_tree",
    "run_confined",
    "unpack_layers",
    "unpack_tree",
]

_DIGEST = re.compile(r"(?:sha256:)?([0-9a-f]{64})", re.ASCII)
_CHECK_LEAKS = 3  # qemu-img(1)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One archive of an OCI image."""

    path: Path
    media: str = ""
    """Its media type. How it is compressed, its first bytes say."""
    digest: str = ""
    """Of the file, as `sha256:HEX`."""
    diff_id: str = ""
    """Of the tar stream in it."""


@dataclass(frozen=True, kw_only=True)
class DiskFacts:
    """What a disk's header says, after it was checked."""

    format: str
    virtual_bytes: int


def unpack_layers(
    host: Host,
    layers: Sequence[Layer],
    target: Path,
    *,
    limits: Limits = DEFAULTS,
    events: Sink = ignore,
    subject: str = "",
) -> None:
    """Apply the layers of an OCI image in their order to a new tree, `target`.

    Owners, modes, times, attributes and hard links are kept, whiteouts done; devices below /dev are left out. Raises
    InvalidSpec with the reason for what is not acceptable, HostError for a full file system.
    """
    for layer in layers:
        if layer.media.endswith("+encrypted"):
            raise InvalidSpec(f"{subject or layer.path.name!r} has an encrypted layer", hint="decrypt it with skopeo")
    archives = tuple(
        unpack.Archive(sha256=_parse_digest(layer.digest), expanded_sha256=_parse_digest(layer.diff_id))
        for layer in layers
    )
    request = unpack.Request(archives=archives, bounds=_bounds(limits), has_whiteouts=True)
    _unpack(_Job(host, [layer.path for layer in layers], target, limits), request, events, subject or target.name)


def unpack_tree(
    host: Host,
    archive: Path,
    target: Path,
    *,
    digest: str = "",
    limits: Limits = DEFAULTS,
    events: Sink = ignore,
    subject: str = "",
) -> None:
    """Unpack one archive into a new tree, `target`: tar (plain, gzip, xz, zstd, bzip2) or squashfs.

    As `unpack_layers`, but that no name has a meaning.
    """
    archives = (unpack.Archive(sha256=_parse_digest(digest)),)
    request = unpack.Request(archives=archives, bounds=_bounds(limits), has_whiteouts=False)
    _unpack(_Job(host, [archive], target, limits), request, events, subject or archive.name)


def check_disk(host: Host, path: Path, *, format: str = "", limits: Limits = DEFAULTS) -> DiskFacts:
    """What a disk is, from its header alone, before any other program sees it.

    `format` is `qcow2` or `raw` where somebody knows it; without it, what is nothing else is raw. Raises InvalidSpec for
    anything that is not a plain disk of its own: another format, a backing or data file, encryption, unknown features.
    """
    bounds = (limits.virtual_bytes, limits.virtual_ratio)
    found, virtual_bytes, reason = host.shell.call(qcow2.examine, path, format, *bounds)
    if reason:
        raise InvalidSpec(f"cannot use the disk {str(path)!r}: {reason}", hint=_disk_hint(reason))
    return DiskFacts(format=found, virtual_bytes=virtual_bytes)


def check_sound(host: Host, source: Path, *, limits: Limits = DEFAULTS) -> DiskFacts:
    """A qcow2 file that is to be used as it is: as `check_disk`, and its tables. Raises InvalidSpec."""
    facts = check_disk(host, source, format="qcow2", limits=limits)
    _Conversion(host=host, source=source, facts=facts, scratch=source.parent, limits=limits).check_tables()
    return facts


def convert_disk(
    host: Host,
    source: Path,
    target: Path,
    *,
    format: str,
    limits: Limits = DEFAULTS,
    events: Sink = ignore,
    subject: str = "",
) -> DiskFacts:
    """Make a clean qcow2 file of its own (0444) of a disk, and say what it is.

    Raises InvalidSpec for a disk that `check_disk` or `qemu-img check` refuses, HostError for a full file system; no
    target stays then.
    """
    facts = check_disk(host, source, format=format, limits=limits)
    scratch = target.with_name(f".{target.name}.convert")
    host.shell.call(files.make_directory, scratch, 0o700)
    work = _Conversion(host=host, source=source, facts=facts, scratch=scratch, limits=limits)
    total_bytes = facts.virtual_bytes

    def tell(share: float) -> None:
        done_bytes = int(share * total_bytes)
        events(Progress(subject or source.name, "copying the disk", done_bytes, total_bytes, is_bytes=True))

    try:
        events(Progress(subject or source.name, "checking the disk", 0, 0))
        work.check()
        made = work.convert(tell)
        host.shell.call(files.publish, made, target)
        tell(1)
    finally:
        host.shell.call(files.remove, scratch)
    return check_disk(host, target, format="qcow2", limits=limits)


def read_in_tree(host: Host, tree: Path, name: str, *, limit_bytes: int = 1024**2) -> bytes | None:
    """The content of a file of a foreign tree, `etc/passwd` for example; None when there is none.

    Links are followed inside the tree. Raises InvalidSpec when it is no regular file or a longer one.
    """
    content, reason = host.shell.call(inroot.read, tree, name, limit_bytes)
    if reason:
        raise InvalidSpec(f"cannot use {name!r} of the tree {str(tree)!r}: {reason}", hint="use another image")
    return content


def _parse_digest(text: str) -> str:
    """A SHA-256 in hex, or nothing. Raises InvalidSpec for any other digest."""
    match = _DIGEST.fullmatch(text)
    if text and match is None:
        raise InvalidSpec(f"{text[:100]!r} is not a SHA-256 digest", hint="sha256: and 64 hexadecimal digits")
    return match.group(1) if match else ""


@dataclass(frozen=True)
class _Job:
    """Archives, and where they go."""

    host: Host
    archives: Sequence[Path]
    target: Path
    limits: Limits


def _unpack(job: _Job, request: unpack.Request, events: Sink, subject: str) -> None:
    host, archives, limits = job.host, job.archives, job.limits
    call = host.shell.call
    sizes = [call(files.size, path) for path in archives]
    missing = next((path for path, size in zip(archives, sizes, strict=True) if not size), None)
    if missing is not None:
        raise InvalidSpec(f"{str(missing)!r} is missing or empty", hint="fetch it again")
    call(files.make_directory, job.target, 0o755)
    if call(files.list_names, job.target):
        raise HostError(f"cannot unpack {subject!r}: {str(job.target)!r} is not empty", hint="hvctl gc")
    confinement = sandbox.Confinement(
        directory=job.target,
        read_only=tuple((path, sandbox.place_input(number)) for number, path in enumerate(archives)),
        capabilities=unpack.CAPABILITIES,
        cpu_s=limits.cpu_s,
        memory_bytes=limits.memory_bytes,
        file_bytes=limits.file_bytes,
    )
    total_bytes = sum(sizes)

    def on_line(line: str) -> None:
        host.pause(0)
        done = line.removeprefix(refusal.PROGRESS)
        if done != line and done.isdigit():
            events(Progress(subject, "unpacking", int(done), total_bytes, is_bytes=True))

    argv = sandbox.python_command(confinement, "unpack", [unpack.format_request(request)])
    attempt = f"cannot unpack {subject!r}"
    done = confined.wait_for(host, argv, attempt, limits, on_line)
    if done.status != 0:
        raise confined.explain(done, attempt, limits)
    events(Progress(subject, "unpacking", total_bytes, total_bytes, is_bytes=True))


def _bounds(limits: Limits) -> unpack.Bounds:
    return unpack.Bounds(
        entries=limits.entries,
        expanded_bytes=limits.expanded_bytes,
        ratio=limits.ratio,
        ratio_floor_bytes=limits.ratio_floor_bytes,
        depth=limits.depth,
        path_bytes=limits.path_bytes,
        reserve_bytes=limits.reserve_bytes,
    )


def _disk_hint(reason: str) -> str:
    if "backing file" in reason:
        return "flatten it where it comes from: qemu-img convert -O qcow2"
    return "convert it where it comes from: qemu-img convert -O qcow2; or get it again"


@dataclass(frozen=True, kw_only=True)
class _Conversion:
    """A disk on its way to a clean file."""

    host: Host
    source: Path
    facts: DiskFacts
    scratch: Path
    limits: Limits

    def check(self) -> None:
        """Let qemu-img look at its tables, and see that what they hold will fit."""
        allocated_bytes = file_bytes = self.host.shell.call(files.disk_usage, self.source)
        if self.facts.format == "qcow2":
            answer = self.check_tables()
            clusters = answer.get("total-clusters", 0)
            allocated_bytes = answer.get("allocated-clusters", 0) * (self.facts.virtual_bytes // max(clusters, 1))
        if allocated_bytes > max(self.limits.ratio_floor_bytes, self.limits.ratio * file_bytes):
            raise InvalidSpec(
                f"the disk {str(self.source)!r} holds more than {self.limits.ratio} times its size", hint="get it again"
            )
        free_bytes = self.host.shell.call(files.available_bytes, self.scratch) - self.limits.reserve_bytes
        if allocated_bytes > free_bytes:
            raise HostError(
                f"the disk {str(self.source)!r} takes {format_size(allocated_bytes)}, "
                f"and only {format_size(max(free_bytes, 0))} are free",
                hint="free some space: hvctl image list; hvctl gc",
            )

    def check_tables(self) -> dict[str, int]:
        """What qemu-img says of a qcow2 file that is sound. Raises InvalidSpec."""
        done = self._run("check", "-f", "qcow2", "--output=json", "--", sandbox.place_input(0))
        if done.status not in (0, _CHECK_LEAKS):
            raise self._blame(done, "is damaged")
        answer: dict[str, int] = json.loads(done.stdout)
        return answer

    def convert(self, tell: Callable[[float], None]) -> Path:
        """The finished file, in the scratch directory; `tell` gets how far that is, from 0 to 1."""
        words = ("convert", "-p", "-f", self.facts.format, "-O", "qcow2", "--", sandbox.place_input(0), "disk.qcow2")
        done = self._run(*words, tell=tell)
        if done.status != 0:
            raise self._blame(done, "cannot be converted")
        made = self.scratch / "disk.qcow2"
        self.host.shell.call(files.set_mode, made, 0o444)
        return made

    def _blame(self, done: Completed, what: str) -> HvctlError:
        """The error that qemu-img's end means: what it says is about the disk, unless the store is full."""
        attempt = f"the disk {str(self.source)!r} {what}"
        error = confined.explain(done, attempt, self.limits)
        if isinstance(error, CommandFailed) and "No space left" not in done.stderr:
            return InvalidSpec(error.message, hint="get it again, or from somebody else")
        return error

    def _run(self, *words: str, tell: Callable[[float], None] | None = None) -> Completed:
        argv, inputs = ["qemu-img", *words], [self.source]
        return run_confined(self.host, self.scratch, argv, read_only=inputs, limits=self.limits, check=False, tell=tell)
