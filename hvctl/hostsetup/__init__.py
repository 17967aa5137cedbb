"""Preparing a host for hvctl, and taking that back.

A part is a pair of functions: `missing` gives the changes that setup would make now, `present` those that teardown
would. Setup, dry run and "nothing to do" are the same code: a second run finds nothing missing. Parts are asked one
after another, because a later one (the network) may need an earlier one (the daemons) to be there.
"""

from __future__ import annotations

from hvctl.errors import HostError, WrongState
from hvctl.events import Note, Sink, ignore
from hvctl.host import Host
from hvctl.hostsetup import daemons, devices, directories, hooks, network, units
from hvctl.hostsetup.change import Change, Part
from hvctl.hostside import files

PARTS: tuple[Part, ...] = (
    Part(name="directories", missing=directories.missing, present=directories.present),
    Part(name="devices", missing=devices.missing, present=devices.present),
    Part(name="hooks", missing=hooks.missing, present=hooks.present),
    Part(name="units", missing=units.missing, present=units.present),
    Part(name="daemons", missing=daemons.missing, present=daemons.present),
    Part(name="network", missing=network.missing, present=network.present),
)


def setup(host: Host, *, dry_run: bool = False, events: Sink = ignore) -> tuple[Change, ...]:
    """Make everything that is missing; gives each change, in order, empty when there was none.

    Raises HostError when something cannot be made; what was made until then stays, and the next run goes on. Only root
    sees what is missing, so a dry run is root's, too.
    """
    _require_root("setting up the host", "hvctl host setup", dry_run)
    return _walk(host, [(part.name, part.missing) for part in PARTS], dry_run, events)


def teardown(host: Host, *, dry_run: bool = False, events: Sink = ignore) -> tuple[Change, ...]:
    """Take everything back that setup made. Images and other data stay.

    Raises WrongState while there are instances: they need the network and the store.
    """
    _require_root("taking back what setup made", "hvctl host teardown", dry_run)
    instances = _list_instances(host)
    if instances:
        raise WrongState(
            f"this host still has instances: {', '.join(instances)}",
            hint=f"delete them first: hvctl delete {instances[0]}",
        )
    return _walk(host, [(part.name, part.present) for part in reversed(PARTS)], dry_run, events)


def _walk(host: Host, parts: list[tuple[str, Part.Finder]], dry_run: bool, events: Sink) -> tuple[Change, ...]:
    done = []
    for _name, find in parts:
        for change in find(host):
            events(Note("", f"would {change.text}" if dry_run else change.text))
            if not dry_run:
                change.apply()
            done.append(change)
    return tuple(done)


def _list_instances(host: Host) -> list[str]:
    """Names of instances; where libvirt does not answer, the directories of the store that may be some's."""
    if daemons.is_answering(host):
        return [instance.name for instance in host.instances()]
    return host.shell.call(files.list_names, host.store.instances)


def _require_root(action: str, command: str, dry_run: bool) -> None:
    import os

    if os.geteuid() != 0:
        words = f"{command} --dry-run" if dry_run else command
        raise HostError(f"{action} needs root, and so does seeing what it would do", hint=f"sudo {words}")
