"""An image as one file that another host imports: a tar archive, compressed by zstd.

    manifest.json   first: what the image is, and size and SHA-256 of every other member
    vmlinuz initrd disk.qcow2 tree.tar

The same image gives the same bytes. One half is in it, the disk where the image has one of its own, else the tree; with
`is_full` both. Coming in, such a file is trusted no more than any other: unpacked confined, every digest computed, the disk
checked and copied, the image's description rebuilt from what it may say (`described.py`).
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hvctl.errors import AlreadyExists, HostError, InvalidSpec
from hvctl.events import Sink, ignore
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.model import Artefact, Disk, Image
from hvctl.rootfs import archives, building, confined, described, halves, intake, manifest, published
from hvctl.rootfs.building import Building
from hvctl.units import GIB
from hvctl.values import dataclass

FORMAT, SCHEMA = "hvctl-image", 1
# A frame that zstd skips (RFC 8878, 3.1.2): the file says at once what it is.
_MARK = b"\x50\x2a\x4d\x18" + (12).to_bytes(4, "little") + b"hvctl image\n"
_APPEND = 'exec tar "$@" >> "$0"'
_MANIFEST, _TREE = "manifest.json", "tree.tar"
_MANIFEST_LIMIT_BYTES = 1024**2
_BOOT_FILE_LIMIT_BYTES = 256 * 1024**2
_PACK_TIMEOUT_S = 7200
_RECORD_BYTES = 10240
_LIMITS = replace(confined.DEFAULTS, entries=16, depth=2)
_CHECKPOINT = re.compile(r"checkpoint ([0-9]{1,15})")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A file that was written."""

    path: Path
    size_bytes: int
    sha256: str


def export(host: Host, name: str, target: Path, *, is_full: bool = False, events: Sink = ignore) -> Exported:
    """Write an image to a file, which appears whole or not at all.

    Raises NotFound, AlreadyExists where the file is, HostError without space.
    """
    host.require_root("image export")
    _check_target(host, target)
    call = host.shell.call
    with _packed(host, name, events, is_full=is_full) as (work, aside):
        work.tell("writing the file", 90)
        sha256, size_bytes = call(files.hash_file, aside), call(files.size, aside)
        call(files.set_mode, aside, 0o600)  # password hashes may be in it, and keys in homes
        call(files.place, aside, target)
        work.tell("done", 100)
    return Exported(path=target, size_bytes=size_bytes, sha256=sha256)


def send(host: Host, name: str, descriptor: int, *, is_full: bool = False, events: Sink = ignore) -> None:
    """Write an image to an open descriptor."""
    host.require_root("image export")
    with _packed(host, name, events, is_full=is_full) as (work, aside):
        work.tell("writing", 90)
        host.shell.call(files.send, aside, descriptor)
        work.tell("done", 100)


def is_bundle(host: Host, path: Path) -> bool:
    """Whether a file begins like one that was exported."""
    return host.shell.call(files.read_head, path, limit_bytes=len(_MARK)) == _MARK


def take_in(work: Building, source: Path) -> Image:
    """Bring what `export` wrote into a building, checked. Raises InvalidSpec with the reason for what is refused."""
    folder = work.directory / "bundle"
    intake.unpack_tree(work.host, source, folder, limits=_LIMITS, events=work.events, subject=source.name)
    content = intake.read_in_tree(work.host, folder, _MANIFEST, limit_bytes=_MANIFEST_LIMIT_BYTES)
    try:
        data = json.loads(content or b"")
        if (data["format"], data["schema"]) != (FORMAT, SCHEMA):
            raise ValueError(f"it is {str(data['format'])[:40]!r} of version {str(data['schema'])[:10]!r}")
        image = described.parse_image(data["image"])
        members = [described.parse_member(file, facts) for file, facts in data["files"].items()]
        if sorted(member.file for member in members) != sorted(_names_of(image)):
            raise ValueError("it does not hold what it says")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InvalidSpec(
            f"{source.name!r} is no image that this hvctl can import: {error}", hint="ask who exported it"
        ) from error
    for number, member in enumerate(members):
        work.tell("checking digests", 40 + 5 * number)
        _check_member(work, folder, member, source.name)
    # An image is known by what it consists of. What a stranger says of the tree would let it pass for another image.
    digest = next((f"sha256:{member.sha256}" for member in members if member.file == _TREE), "")
    return _place(work, folder, replace(image, tree_digest=digest))


@contextlib.contextmanager
def _packed(host: Host, name: str, events: Sink, *, is_full: bool) -> Iterator[tuple[Building, Path]]:
    """The finished file, in a building's directory for the block."""
    image = published.get_image(host, name)
    if is_full:
        image = halves.ensure_tree(host, halves.ensure_disk(host, image, events), events)
    with building.begin(host, name, events, needed_bytes=_estimate(host, image)) as work:
        aside = work.directory / "image.tar.zst"
        _pack(work, _collect(work, image, is_full=is_full), aside)
        yield work, aside


def _check_target(host: Host, target: Path) -> None:
    if host.shell.call(files.exists, target):
        raise AlreadyExists(f"there is already a {str(target)!r}", hint="choose another name, or remove it")
    if not host.shell.call(files.is_directory, target.parent):
        raise HostError(
            f"there is no directory {str(target.parent)!r}", hint=f"mkdir -p {shlex.quote(str(target.parent))}"
        )


def _estimate(host: Host, image: Image) -> int:
    """Bytes that the work takes in the store, about."""
    disk_bytes = image.disk.artefact.size_bytes if image.disk else 0
    tree_bytes = host.shell.call(files.disk_usage, host.store.image_tree(image.id)) if image.has_tree else 0
    return 2 * max(disk_bytes, tree_bytes) + GIB // 8


def _select(image: Image, *, is_full: bool) -> Image:
    """The image as it goes out: with both halves, or with one of its own. Its files keep their names."""
    has_own_disk = image.disk is not None and "/" not in image.disk.artefact.file
    if not is_full and not has_own_disk:
        image = replace(image, disk=None, kernel=None, initrd=None, kernel_arguments=(), kernel_release="")
    if not is_full and has_own_disk:
        image = replace(image, has_tree=False, tree_digest="")
    # Its name here, and where it came from, are nobody else's business.
    return manifest.seal(replace(image.bare, name="", source="", origin=""))


def _collect(work: Building, image: Image, *, is_full: bool) -> list[Path]:
    """What goes into the file, the manifest first."""
    host, call = work.host, work.host.shell.call
    chosen, folder = _select(image, is_full=is_full), host.store.image(image.id)
    found = []
    if chosen.disk is not None:
        found += [(folder / part.file, part.bare) for part in image.artefacts]
    if chosen.has_tree:
        work.tell("packing the tree", 5)
        path = work.directory / _TREE
        archives.write(host, work.directory, host.store.image_tree(image.id), _TREE)
        facts = Artefact(file=_TREE, size_bytes=call(files.size, path), sha256=call(files.hash_file, path))
        found.append((path, facts))
    facts_by_name = {part.file: {"size_bytes": part.size_bytes, "sha256": part.sha256} for _path, part in found}
    data = {"format": FORMAT, "schema": SCHEMA, "image": manifest.as_dict(chosen), "files": facts_by_name}
    content = json.dumps(data, indent=2, sort_keys=True).encode() + b"\n"
    call(files.write_file, work.directory / _MANIFEST, content, 0o444)
    return [work.directory / _MANIFEST, *(path for path, _part in found)]


def _pack(work: Building, members: list[Path], target: Path) -> None:
    work.host.shell.call(files.write_file, target, _MARK, 0o600)
    words = ["sh", "-c", _APPEND, str(target), "--create", "--format=gnu", "--mode=0444", "--mtime=@0"]
    words += ["--numeric-owner", "--owner=0", "--group=0"]
    words += ["--use-compress-program=zstd -q -T0", "--checkpoint=1000", "--file=-"]
    for path in members:
        words += [f"--directory={path.parent}", path.name]
    total_bytes = sum(work.host.shell.call(files.size, path) for path in members)

    def on_line(line: str) -> None:
        match = _CHECKPOINT.search(line)
        if match is not None:
            work.tell("compressing", 30 + 60 * min(1, int(match[1]) * _RECORD_BYTES / max(total_bytes, 1)))

    work.host.shell.run(words, timeout_s=_PACK_TIMEOUT_S, on_line=on_line)


def _names_of(image: Image) -> list[str]:
    return [*(part.file for part in image.artefacts), *([_TREE] if image.has_tree else [])]


def _check_member(work: Building, folder: Path, member: Artefact, source: str) -> None:
    call, path = work.host.shell.call, folder / member.file
    if not call(files.is_regular, path):
        raise InvalidSpec(f"{source!r} lacks its member {member.file!r}", hint="get it again")
    if (call(files.size, path), call(files.hash_file, path)) != (member.size_bytes, member.sha256):
        raise InvalidSpec(f"{source!r} is damaged: {member.file!r} is not what it should be", hint="get it again")


def _place(work: Building, folder: Path, image: Image) -> Image:
    """Give what was checked its places in the image; what is computed anew is the image's from now on."""
    host, call = work.host, work.host.shell.call
    boot: list[Artefact | None] = []
    for part in (image.kernel, image.initrd):
        if part is not None and call(files.size, folder / part.file) > _BOOT_FILE_LIMIT_BYTES:
            raise InvalidSpec(f"{part.file!r} is too large to be booted", hint="get it again")
        if part is not None:
            call(files.replace_if_there, folder / part.file, work.image / part.file)
            call(files.set_owner, work.image / part.file, 0, 0)
        boot.append(work.artefact(work.image / part.file) if part else None)
    if image.disk is not None:
        file = image.disk.artefact.file
        facts = intake.convert_disk(
            host, folder / file, work.image / file, format=image.disk.format, events=work.events, subject=work.name
        )
        disk = Disk(artefact=work.artefact(work.image / file), format=facts.format, virtual_bytes=facts.virtual_bytes)
        image = replace(image, disk=disk)
    if image.has_tree:
        call(files.make_directory, work.rootfs.parent, 0o700)
        intake.unpack_tree(host, folder / _TREE, work.rootfs, events=work.events, subject=work.name)
    return replace(image, id="", kernel=boot[0], initrd=boot[1])
