"""An image's manifest: the Image value as `manifest.json`, and back. The only place that knows the file's shape."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from typing import Any

from hvctl.errors import InvalidSpec, Unsupported
from hvctl.model import Artefact, Disk, Image, Provision

SCHEMA = 1


def seal(image: Image) -> Image:
    """The image with its identifier: the SHA-256, in hex, of its manifest without identifier, name and time.

    So one and the same content has one identifier, whenever it was built and however it is called.
    """
    content = _as_dict(image)
    for field in ("id", "name", "created_at"):
        del content[field]
    return replace(image, id=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest())


def format_manifest(image: Image) -> bytes:
    """The file's content."""
    return json.dumps(_as_dict(image), indent=2, sort_keys=True).encode() + b"\n"


def parse(content: bytes, source: str) -> Image:
    """The image that a manifest describes. Raises Unsupported for a newer schema, InvalidSpec for a damaged file."""
    try:
        data = json.loads(content)
        if data["schema"] > SCHEMA:
            raise Unsupported(f"the image in {source} was made by a newer hvctl", hint="upgrade hvctl on this machine")
        return _from_dict(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidSpec(f"the manifest {source} is damaged: {error!r}", hint="build the image again") from error


def _as_dict(image: Image) -> dict[str, Any]:
    return {"schema": SCHEMA, **asdict(image)}


def _from_dict(data: dict[str, Any]) -> Image:
    disk = data["disk"]
    return Image(
        id=str(data["id"]),
        name=str(data["name"]),
        os=str(data["os"]),
        version=str(data["version"]),
        architecture=str(data["architecture"]),
        created_at=str(data["created_at"]),
        login_user=str(data["login_user"]),
        provision=Provision(data["provision"]),
        disk=None
        if disk is None
        else Disk(
            artefact=_artefact(disk["artefact"]), format=str(disk["format"]), virtual_bytes=int(disk["virtual_bytes"])
        ),
        kernel=_artefact(data["kernel"]) if data["kernel"] else None,
        initrd=_artefact(data["initrd"]) if data["initrd"] else None,
        kernel_arguments=tuple(str(word) for word in data["kernel_arguments"]),
        kernel_release=str(data["kernel_release"]),
        has_tree=bool(data["has_tree"]),
        packages=tuple(str(package) for package in data["packages"]),
    )


def _artefact(data: dict[str, Any]) -> Artefact:
    file = str(data["file"])
    if "/" in file or file.startswith("."):
        raise ValueError(f"file name {file!r}")
    return Artefact(file=file, size_bytes=int(data["size_bytes"]), sha256=str(data["sha256"]))
