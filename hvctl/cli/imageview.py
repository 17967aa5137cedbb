"""Images as people and programs see them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hvctl.cli.present import format_age
from hvctl.model import Image, Process, Provision
from hvctl.units import format_size

if TYPE_CHECKING:
    from hvctl.images import Listed

_SHOWN_USERS = 2


def as_json(item: Listed) -> dict[str, object]:
    """An image for programs. Names here are part of the interface: add, never rename."""
    found = item.image
    if found is None:
        return {"name": item.name, "problem": item.problem}
    return {
        "name": item.name,
        "id": found.id,
        "os": found.os,
        "version": found.version,
        "architecture": found.architecture,
        "created_at": found.created_at,
        "login_user": found.login_user,
        "provision": found.provision.value,
        "kernel": found.kernel_release,
        "kernel_arguments": list(found.kernel_arguments),
        "disk_bytes": found.disk.virtual_bytes if found.disk else 0,
        "size_bytes": item.size_bytes,
        "has_disk": found.disk is not None,
        "has_tree": found.has_tree,
        "made": list(item.made),
        "process": _process_as_json(found.process) if found.process else None,
        "firmware": found.firmware.value,
        "source": found.source,
        "origin": found.origin,
        "packages": list(found.packages),
        "users": list(item.users),
        "problem": "",
    }


def _process_as_json(process: Process) -> dict[str, object]:
    return {
        "entrypoint": list(process.entrypoint),
        "command": list(process.command),
        "environment": dict(process.environment),
        "user": process.user,
        "directory": process.directory,
        "ports": list(process.ports),
        "stop_signal": process.stop_signal,
    }


def _process_as_pairs(process: Process) -> list[tuple[str, str]]:
    return [
        ("entrypoint", shlex.join(process.entrypoint)),
        ("command", shlex.join(process.command)),
        *(("environment", f"{key}={value}") for key, value in process.environment),
        ("user", process.user),
        ("directory", process.directory),
        ("ports", " ".join(process.ports)),
        ("stop signal", process.stop_signal),
    ]


def _login_of(image: Image) -> str:
    if image.process is not None:
        return ""
    return image.login_user if image.provision is not Provision.NONE else "by exec only: no cloud-init"


def as_row(item: Listed) -> tuple[str, ...]:
    found = item.image
    if found is None:
        return (item.name, "damaged", "-", "-", "-", "-", "-", "-")
    return (
        item.name,
        found.id[:12],
        f"{found.os} {found.version}".rstrip(),
        found.kernel_release or "-",
        format_size(found.disk.virtual_bytes) if found.disk else "-",
        format_size(item.size_bytes),
        format_users(item.users),
        format_age(found.created_at),
    )


def format_users(names: Sequence[str]) -> str:
    """The first two, and how many more."""
    rest = len(names) - _SHOWN_USERS
    return ", ".join([*names[:_SHOWN_USERS], *([f"+{rest}"] if rest > 0 else [])]) or "-"


def as_pairs(item: Listed) -> list[tuple[str, str]]:
    found = item.image
    assert found is not None
    digests = [(part.file, part.sha256) for part in (found.kernel, found.initrd) if part is not None]
    if found.disk is not None:
        digests.insert(0, (found.disk.artefact.file, found.disk.artefact.sha256))
    return [
        ("name", item.name),
        ("id", found.id),
        ("os", f"{found.os} {found.version} ({found.architecture})"),
        ("disk", _describe_half(item, "disk", found.disk is not None)),
        ("tree", _describe_half(item, "tree", found.has_tree)),
        ("login", _login_of(found)),
        *(_process_as_pairs(found.process) if found.process else []),
        ("kernel", found.kernel_release),
        ("arguments", " ".join(found.kernel_arguments)),
        ("disk size", format_size(found.disk.virtual_bytes) if found.disk else ""),
        ("size", format_size(item.size_bytes)),
        ("firmware", found.firmware.value if found.disk and not found.kernel else ""),
        ("source", found.source),
        ("packages", " ".join(found.packages)),
        ("used by", ", ".join(item.users)),
        ("created", f"{found.created_at} ({format_age(found.created_at)} ago)"),
        *(("sha256", f"{digest}  {file}") for file, digest in digests),
    ]


def _describe_half(item: Listed, half: str, is_there: bool) -> str:
    """Whether it came with the image, was made, or would be made; for VMs the disk, for containers the tree."""
    users = {"disk": "VMs", "tree": "containers"}[half]
    if not is_there:
        return f"made when the first of its {users} needs it"
    return "there, made for the first that needed it" if half in item.made else "there"
