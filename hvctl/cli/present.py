"""How instances look: stable JSON field names for programs, columns for people."""

from __future__ import annotations

import datetime

from hvctl.model import DataDisk, Instance, Mount, State
from hvctl.units import format_duration, format_size

LIST_COLUMNS = ("NAME", "STATE", "MODE", "IMAGE", "CPUS", "MEMORY", "ADDRESS", "AGE")


def as_json(instance: Instance, *, exit_code: int | None = None) -> dict[str, object]:
    """An instance for programs. Names here are part of the interface: add, never rename.

    `exit_code`: of an application that is off.
    """
    record, live, spec = instance.record, instance.live, instance.record.spec
    return {
        "name": record.name,
        "mode": record.mode.value,
        "state": instance.state.value,
        "cause": live.cause,
        "exit_code": exit_code,
        "uuid": str(record.uuid),
        "image": spec.image,
        "image_id": record.image_id,
        "cpus": live.cpus,
        "memory_bytes": live.memory_bytes,
        "disk_bytes": spec.disk_bytes,
        "address": record.address,
        "mac": record.mac,
        "network": record.network,
        "user": record.login_user,
        "host_key": record.host_key,
        "accelerator": record.accelerator.value if record.accelerator else None,
        "kernel": record.kernel_release,
        "privileged": spec.is_privileged,
        "first_id": record.first_id,
        "application": record.is_application,
        "ephemeral": spec.is_ephemeral,
        "cpuset": spec.cpuset,
        "processes": spec.processes or None,
        "mounts": [
            {"source": mount.source, "target": mount.target, "read_only": mount.is_read_only} for mount in spec.mounts
        ],
        "disks": [
            {
                "name": disk.name,
                "size_bytes": disk.size_bytes or None,
                "target": disk.target,
                "serial": disk.serial or None,
            }
            for disk in record.disks
        ],
        "template": spec.template,
        "variables": dict(spec.variables),
        "autostart": live.is_autostart,
        "created_at": record.created_at,
        "labels": dict(record.labels),
        "snapshots": [item.name for item in record.snapshots if not item.purpose.is_passing],
        "keep": dict(record.keep),
        "asked": {"cpus": spec.cpus, "memory_bytes": spec.memory_bytes, "autostart": spec.autostart},
        "pending": {"verb": record.pending.verb, "step": record.pending.step} if record.pending else None,
    }


def as_row(instance: Instance) -> tuple[str, ...]:
    """An instance as a line of `list`."""
    record, live = instance.record, instance.live
    return (
        record.name,
        instance.state.value,
        _mode(instance),
        record.spec.image,
        str(live.cpus),
        format_size(live.memory_bytes),
        record.address or "-",
        format_age(record.created_at),
    )


def as_pairs(instance: Instance, root_bytes: int, exit_code: int | None = None) -> list[tuple[str, str]]:
    """An instance as the lines of `show`; where what was asked and what is differ, both.

    `root_bytes` 0: no size. `exit_code`: of an application that is off.
    """
    record, live, spec = instance.record, instance.live, instance.record.spec
    cause = live.cause if exit_code is None else f"exit code {exit_code}"
    state = f"{instance.state.value} ({cause})" if cause else instance.state.value
    if record.pending:
        state = f"incomplete: {record.pending.verb} stopped at {record.pending.step!r}; next: hvctl gc"
    return [
        ("name", record.name),
        ("state", state),
        ("mode", _mode(instance)),
        ("image", f"{spec.image} ({record.image_id[:12]})"),
        ("cpus", _with_next(instance, str(live.cpus), str(spec.cpus))),
        ("memory", _with_next(instance, format_size(live.memory_bytes), format_size(spec.memory_bytes))),
        ("disk", format_size(root_bytes) if root_bytes else ""),
        ("address", record.address),
        ("mac", record.mac),
        ("network", record.network),
        ("login", f"{record.login_user}@{record.address}" if record.address and not record.is_application else ""),
        ("host key", record.host_key),
        ("accelerator", record.accelerator.value if record.accelerator else ""),
        ("kernel", record.kernel_release),
        ("ids", f"{record.first_id} to {record.first_id + 65535} on the host" if record.first_id else ""),
        ("kept", "until its `run` ends" if spec.is_ephemeral else ""),
        ("cpuset", spec.cpuset),
        ("processes", f"{spec.processes} at most" if spec.processes else ""),
        *(("mount", _format_mount(mount)) for mount in spec.mounts),
        *(("data disk", _format_disk(disk)) for disk in record.disks),
        ("template", spec.template),
        ("variables", " ".join(f"{key}={value}" for key, value in spec.variables)),
        ("autostart", _both("yes" if live.is_autostart else "no", "yes" if spec.autostart else "no")),
        ("snapshots", " ".join(item.name for item in record.snapshots if not item.purpose.is_passing)),
        ("keep", ",".join(f"{every}={count}" for every, count in record.keep)),
        ("created", f"{record.created_at} ({format_age(record.created_at)} ago)"),
        ("uuid", str(record.uuid)),
        ("labels", " ".join(f"{key}={value}" for key, value in record.labels)),
    ]


def format_age(created_at: str) -> str:
    """How long ago a time stamp is: `5m02s`, `3d`."""
    try:
        then = datetime.datetime.fromisoformat(created_at)
    except ValueError:
        return "-"
    return format_duration(max(0.0, (datetime.datetime.now(datetime.UTC) - then).total_seconds()))


def _mode(instance: Instance) -> str:
    """The mode, and what must not be overlooked about it."""
    record = instance.record
    return f"{record.mode.value}, privileged" if record.spec.is_privileged else record.mode.value


def _format_mount(mount: Mount) -> str:
    return f"{mount.source} at {mount.target}{' (read-only)' if mount.is_read_only else ''}"


def _format_disk(disk: DataDisk) -> str:
    size = f", {format_size(disk.size_bytes)}" if disk.size_bytes else ""
    return f"{disk.name} at {disk.target}{size}{' (read-only)' if disk.is_read_only else ''}"


def _with_next(instance: Instance, live: str, asked: str) -> str:
    """What holds now, and what is to hold from its next start on."""
    if live == asked or instance.state in (State.STOPPED, State.CRASHED):
        return _both(live, asked)
    return f"{live} ({asked} from the next start on)"


def _both(live: str, asked: str) -> str:
    return live if live == asked else f"{live} now (asked: {asked})"
