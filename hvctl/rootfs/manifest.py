"""An image's manifest: the Image value as `manifest.json`, and back. The only place that knows the file's shape.

The identifier is the SHA-256, in hex, of the manifest's content without identifier, name, source, origin and time of building:
the same files have the same identifier whenever they were built, wherever they came from and however they are called.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, replace
from typing import Any

from hvctl.errors import InvalidSpec, Unsupported
from hvctl.model import Artefact, Disk, Firmware, Image, Process, Provision

SCHEMA = 1

_OUTSIDE_IDENTIFIER = ("id", "name", "created_at", "source", "origin")
# A plain file in the image's own directory: never a path, an option or a hidden file.
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


def seal(image: Image) -> Image:
    """The image with its identifier."""
    return replace(image, id=_identify(_as_dict(image)))


def format_manifest(image: Image) -> bytes:
    """The file's content."""
    return json.dumps(_as_dict(image), indent=2, sort_keys=True).encode() + b"\n"


def parse(content: bytes, source: str) -> Image:
    """The image that a manifest describes; keys that this version does not know are left aside.

    Raises Unsupported for a newer schema, InvalidSpec for a damaged file or one that was changed after it was sealed.
    """
    try:
        data = json.loads(content)
        if int(data["schema"]) > SCHEMA:
            raise Unsupported(f"the image in {source} was made by a newer hvctl", hint="upgrade hvctl on this machine")
        image = _from_dict(data)
        if image.id != _identify(data):
            raise ValueError("its content is not what its identifier says")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InvalidSpec(f"the manifest {source} is damaged: {error!r}", hint="build the image again") from error
    return image


def with_disk(image: Image, data: dict[str, Any], folder: str) -> Image:
    """The image with the disk, and what boots it, that `data` describes; the files are in `folder` of the image's own."""

    def place(artefact: Artefact | None) -> Artefact | None:
        return replace(artefact, file=f"{folder}/{artefact.file}") if artefact else None

    disk = _disk(data["disk"])
    return replace(
        image,
        disk=replace(disk, artefact=replace(disk.artefact, file=f"{folder}/{disk.artefact.file}")),
        kernel=place(_artefact(data["kernel"]) if data["kernel"] else None),
        initrd=place(_artefact(data["initrd"]) if data["initrd"] else None),
        kernel_arguments=tuple(str(word) for word in data["kernel_arguments"]),
        kernel_release=str(data["kernel_release"]),
    )


def format_disk(image: Image) -> bytes:
    """What `with_disk` takes, of an image whose disk, kernel and initrd lie beside this file."""
    kept = ("disk", "kernel", "initrd", "kernel_arguments", "kernel_release")
    data = {"schema": SCHEMA, **{key: value for key, value in asdict(image).items() if key in kept}}
    return json.dumps(data, indent=2, sort_keys=True).encode() + b"\n"


def _identify(data: dict[str, Any]) -> str:
    content = {key: value for key, value in data.items() if key not in _OUTSIDE_IDENTIFIER}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _as_dict(image: Image) -> dict[str, Any]:
    return {"schema": SCHEMA, **asdict(image)}


def _from_dict(data: dict[str, Any]) -> Image:
    return Image(
        id=str(data["id"]),
        name=str(data["name"]),
        os=str(data["os"]),
        version=str(data["version"]),
        architecture=str(data["architecture"]),
        created_at=str(data["created_at"]),
        login_user=str(data["login_user"]),
        provision=Provision(data["provision"]),
        disk=_disk(data["disk"]) if data["disk"] else None,
        kernel=_artefact(data["kernel"]) if data["kernel"] else None,
        initrd=_artefact(data["initrd"]) if data["initrd"] else None,
        kernel_arguments=tuple(str(word) for word in data["kernel_arguments"]),
        kernel_release=str(data["kernel_release"]),
        has_tree=bool(data["has_tree"]),
        packages=tuple(str(package) for package in data["packages"]),
        firmware=Firmware(data.get("firmware", "bios")),
        tree_digest=str(data.get("tree_digest", "")),
        process=_process(data["process"]) if data.get("process") else None,
        source=str(data.get("source", "")),
        origin=str(data.get("origin", "")),
    )


def _process(data: dict[str, Any]) -> Process:
    return Process(
        entrypoint=tuple(str(word) for word in data["entrypoint"]),
        command=tuple(str(word) for word in data["command"]),
        environment=tuple((str(name), str(value)) for name, value in data["environment"]),
        user=str(data["user"]),
        directory=str(data["directory"]),
        ports=tuple(str(port) for port in data["ports"]),
        stop_signal=str(data["stop_signal"]),
    )


def _disk(data: dict[str, Any]) -> Disk:
    return Disk(
        artefact=_artefact(data["artefact"]), format=str(data["format"]), virtual_bytes=int(data["virtual_bytes"])
    )


def _artefact(data: dict[str, Any]) -> Artefact:
    file = str(data["file"])
    if not _FILE.fullmatch(file):
        raise ValueError(f"file name {file!r}")
    return Artefact(file=file, size_bytes=int(data["size_bytes"]), sha256=str(data["sha256"]))
