"""A backup as a value, and its manifest: the one file that says what a backup consists of. docs/backups.md has the format.

A manifest comes from outside: every value is checked by its pattern, and what it does not name is not part of an instance
(no paths, no devices, no elements of a definition). What the host would have to give (shared directories, disks that are
not ours) stands in `left_out`, for people to read.
"""

from __future__ import annotations

import dataclasses
import datetime
import ipaddress
import json
import re
from dataclasses import replace
from typing import Any
from uuid import UUID

from hvctl import identity, templates, units
from hvctl.errors import HvctlError, InvalidSpec, Unsupported
from hvctl.instances import schedule
from hvctl.model import AccelChoice, Consistency, Image, Mode, Provision, Spec
from hvctl.rootfs import described, manifest, published
from hvctl.values import dataclass

FORMAT, SCHEMA = "hvctl-backup", 1
MOST_BYTES = 16 * 1024**2
"""Of a manifest."""

ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9]{6}", re.ASCII)
"""The moment that it is of, to the microsecond: backups sort by it."""
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_PLACE = re.compile(r"[0-9a-f]{0,64}", re.ASCII)
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_KEY = re.compile(r"[a-z]{1,10}(:[A-Za-z0-9._-]{0,80}){0,3}", re.ASCII)
_MAC = re.compile(r"52(:[0-9a-f]{2}){5}", re.ASCII)  # identity.new_mac
_RELEASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,79}", re.ASCII)
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}", re.ASCII)
_CPUSET = re.compile(r"[0-9,-]{0,200}", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}", re.ASCII)
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}", re.ASCII)
_MOST_LAYERS = 500
_LARGEST_BYTES = 1024**5
_LONGEST_TEXT = 4000


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing that a backup consists of."""

    name: str
    key: str
    """What it is of a host's store, and so what a later backup of the same need not read again: `layer:ID:PARENT`."""
    sha256: str
    """Of its content, before a repository compresses or encrypts it."""
    size_bytes: int
    used_bytes: int = 0
    """What it takes on a disk, about: without holes."""
    place: str = ""
    """Where a repository finds it, when not by its digest."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The instance that was backed up: what a restored one gets of it."""

    uuid: UUID
    spec: Spec
    """Without shared directories, and without the template where that was a file of the host's."""
    mac: str
    address: str
    login_user: str
    provision: Provision
    kernel_release: str
    authorized_keys: tuple[str, ...]
    created_at: str
    labels: tuple[tuple[str, str], ...] = ()
    keep: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Backup:
    """One backup."""

    id: str
    created_at: str
    """UTC, ISO 8601 to the second."""
    host: str
    """Whose it was."""
    consistency: Consistency
    subject: Subject
    image_id: str
    """Of the image that it stood on; empty where that identifier does not stand for what it stood on."""
    base: Image
    """What of the image it stands on. `tree_digest` is filled in from its part."""
    base_parts: tuple[Part, ...]
    """Empty: the image is not in the backup."""
    layers: tuple[Part, ...]
    """Lowest first."""
    state: Part
    """An archive of what it is beside its root: keys, seed, NVRAM, TPM, a kernel of its own."""
    volumes: tuple[tuple[dict[str, str], Part], ...] = ()
    """Data volumes: each as `metadata.format_disk` gives it, without identifier."""
    left_out: tuple[str, ...] = ()
    """What is not in the backup, for people."""
    comment: str = ""
    definition: str = ""
    """Its definition of then, for people: it is never given to libvirt again."""
    stored_bytes: int = 0
    """What it has added to its repository, before compression."""

    @property
    def name(self) -> str:
        """Of the instance."""
        return self.subject.spec.name

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*self.base_parts, *self.layers, self.state, *(part for _disk, part in self.volumes))

    @property
    def time(self) -> datetime.datetime:
        return units.parse_time(self.created_at)


def format_backup(backup: Backup) -> bytes:
    """The content of a manifest."""
    subject, spec = backup.subject, backup.subject.spec
    data = {
        "format": FORMAT,
        "schema": SCHEMA,
        **{
            key: getattr(backup, key)
            for key in ("id", "created_at", "host", "consistency", "comment", "stored_bytes", "left_out", "definition")
        },
        "instance": {
            "name": spec.name,
            "uuid": str(subject.uuid),
            "mode": spec.mode,
            "image": spec.image,
            "cpus": spec.cpus,
            "memory_bytes": spec.memory_bytes,
            "disk_bytes": spec.disk_bytes,
            "template": spec.template,
            "variables": spec.variables,
            "accel": spec.accel,
            "autostart": spec.autostart,
            "cpuset": spec.cpuset,
            "processes": spec.processes,
            "privileged": spec.is_privileged,
            "provision": subject.provision,
            **{
                key: getattr(subject, key)
                for key in (
                    *("mac", "address", "login_user", "kernel_release", "authorized_keys", "created_at"),
                    *("labels", "keep"),
                )
            },
        },
        "image": {
            "id": backup.image_id,
            "description": manifest.as_dict(backup.base),
            "parts": [_format_part(part) for part in backup.base_parts],
        },
        "layers": [_format_part(part) for part in backup.layers],
        "state": _format_part(backup.state),
        "volumes": [{"disk": disk, **_format_part(part)} for disk, part in backup.volumes],
    }
    return json.dumps(data, indent=1).encode() + b"\n"


def parse_backup(content: bytes, source: str) -> Backup:
    """The backup that a manifest describes. Raises InvalidSpec with the reason, Unsupported for a newer format."""
    try:
        data = json.loads(content)
        if data["format"] != FORMAT:
            raise ValueError("it is something else")
        if int(data["schema"]) > SCHEMA:
            raise Unsupported(f"{source} was made by a newer hvctl", hint="upgrade hvctl on this machine")
        return _parse(data)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InvalidSpec(f"{source} is no manifest of a backup: {reason[:200]}", hint="restore another one") from error
    except HvctlError as error:
        if isinstance(error, Unsupported):
            raise
        raise InvalidSpec(
            f"{source} is no manifest of a backup: {error.message}", hint="restore another one"
        ) from error


def _format_part(part: Part) -> dict[str, object]:
    return dataclasses.asdict(part)


def _parse(data: dict[str, Any]) -> Backup:
    image = data["image"]
    # As one that came in by `image import` describes itself; what it is called and where it came from is left out.
    base = replace(described.parse_image({**image["description"], "tree_digest": ""}), id="", name="")
    layers = tuple(_parse_part(item) for item in data["layers"])
    if len(layers) > _MOST_LAYERS:
        raise ValueError(f"{len(layers)} layers")
    base_parts = tuple(_parse_part(item) for item in image["parts"])
    wanted = [part.file for part in base.artefacts]
    if base_parts and {part.name for part in base_parts} != set(wanted or ["tree.tar"]):
        raise ValueError("it does not hold the image that it says")
    if any(part.name == item.file and part.sha256 != item.sha256 for part in base_parts for item in base.artefacts):
        raise ValueError("the image that it holds is not the one that it says")
    return Backup(
        id=_check(ID, data["id"]),
        created_at=_parse_time(data["created_at"]),
        host=_parse_text(data["host"]),
        consistency=Consistency(data["consistency"]),
        subject=_parse_subject(data["instance"]),
        image_id=_check(_DIGEST, image["id"]) if image["id"] else "",
        base=base,
        base_parts=base_parts,
        layers=layers,
        state=_parse_part(data["state"]),
        volumes=tuple((_parse_disk(item["disk"]), _parse_part(item)) for item in data["volumes"]),
        left_out=tuple(_parse_text(item) for item in data["left_out"]),
        comment=_parse_text(data["comment"]),
        definition=str(data.get("definition", "")),
        stored_bytes=_parse_number(data["stored_bytes"], _LARGEST_BYTES),
    )


def _parse_part(data: dict[str, Any]) -> Part:
    return Part(
        name=_check(_FILE, data["name"]),
        key=_check(_KEY, data["key"]),
        sha256=_check(_DIGEST, data["sha256"]),
        size_bytes=_parse_number(data["size_bytes"], _LARGEST_BYTES),
        used_bytes=_parse_number(data["used_bytes"], _LARGEST_BYTES),
        place=_check(_PLACE, data.get("place", "")),
    )


def _parse_subject(data: dict[str, Any]) -> Subject:
    spec = Spec(
        name=identity.check_name(str(data["name"])),
        mode=Mode(data["mode"]),
        image=published.check_tag(str(data["image"])),
        cpus=_parse_number(data["cpus"], 10_000),
        memory_bytes=_parse_number(data["memory_bytes"], _LARGEST_BYTES),
        disk_bytes=_parse_number(data["disk_bytes"], _LARGEST_BYTES),
        template=_check(templates.NAME, data["template"]) if data["template"] else "",
        variables=_parse_pairs(data["variables"], _VARIABLE),
        accel=AccelChoice(data["accel"]),
        autostart=data["autostart"] is True,
        cpuset=_check(_CPUSET, data["cpuset"]),
        processes=_parse_number(data["processes"], 2**31),
        is_privileged=data["privileged"] is True,
    )
    return Subject(
        uuid=UUID(str(data["uuid"])),
        spec=spec,
        mac=_check(_MAC, data["mac"]),
        address=str(ipaddress.IPv4Address(data["address"])) if data["address"] else "",
        login_user=_check(_USER, data["login_user"]),
        provision=Provision(data["provision"]),
        kernel_release=_check(_RELEASE, data["kernel_release"]) if data["kernel_release"] else "",
        authorized_keys=tuple(identity.check_public_key(str(line)) for line in data["authorized_keys"]),
        created_at=_parse_time(data["created_at"]),
        labels=_parse_pairs(data["labels"], _LABEL),
        keep=tuple(
            (_one_of(tuple(schedule.PERIODS), every), _parse_number(count, 1000)) for every, count in data["keep"]
        ),
    )


def _parse_disk(data: dict[str, Any]) -> dict[str, str]:
    return {_check(re.compile(r"[a-z-]{1,20}"), key): _parse_text(value) for key, value in data.items()}


def _parse_pairs(items: Any, pattern: re.Pattern[str]) -> tuple[tuple[str, str], ...]:
    return tuple((_check(pattern, name), _parse_text(value)) for name, value in items)


def _parse_text(value: Any) -> str:
    text = str(value)
    if not text.isprintable() or len(text) > _LONGEST_TEXT:
        raise ValueError(f"{text[:60]!r} cannot be")
    return text


def _parse_number(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"the number {str(value)[:40]!r} cannot be")
    return value


def _parse_time(value: Any) -> str:
    units.parse_time(str(value))
    return str(value)


def _one_of(words: tuple[str, ...], value: Any) -> str:
    if value not in words:
        raise ValueError(f"{str(value)[:40]!r} cannot be")
    return str(value)


def _check(pattern: re.Pattern[str], value: Any) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{str(value)[:60]!r} cannot be")
    return value
