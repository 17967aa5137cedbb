"""The oracle: everything on a host that hvctl could have touched, as values that can be compared before and after."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from hvctl import gc
from hvctl.host import Host
from hvctl.hostside import files, groups, locks
from hvctl.instances import lifecycle
from hvctl.libvirtapi import networks
from hvctl.model import Mode, Record


@dataclass(frozen=True)
class World:
    """One look at the host. Two looks are equal when nothing was left and nothing was taken."""

    domains: frozenset[tuple[str, str, str]]
    """(driver, name, definition) of every domain, whoever made it."""
    files: frozenset[tuple[str, int, int, str]]
    """(path, mode, owner, SHA-256) of everything in the store."""
    reservations: frozenset[tuple[str, str, str]]
    dns: frozenset[str]
    processes: frozenset[str]
    """Command lines that name the store."""
    mounts: frozenset[str]
    """Mounts below the store, in any mount namespace."""
    links: frozenset[str]
    """Network interfaces of guests."""
    filters: frozenset[str]
    """Elements in nft sets that name a guest's interface."""
    groups: frozenset[str]
    """Control groups of containers."""
    notes: frozenset[str]
    """What the hook has written down for containers that run."""
    locks: frozenset[str]
    """Locks that somebody holds."""


def look(host: Host, *, alive: Record | None = None) -> World:
    """The world as it is now. Of an instance that is `alive` and writes meanwhile, only the names of its files count, and
    none of what is in its layers' directories.
    """
    store = host.store
    return World(
        domains=frozenset(_domains(host, alive)),
        files=frozenset(_files(store.root, alive)),
        reservations=frozenset(
            (item.mac, item.name, item.address)
            for item in networks.list_reservations(host.connection(Mode.VM), host.config.network)
        ),
        dns=frozenset(_dns(host.config.network)),
        processes=frozenset(_processes(str(store.root))),
        mounts=frozenset(_mounts(str(store.root))),
        links=frozenset(name for name in os.listdir("/sys/class/net") if name.startswith("hv")),
        filters=frozenset(_filters()),
        groups=frozenset(_groups()),
        notes=frozenset(files.list_names(Path(groups.NOTES))),
        locks=frozenset(name for name in files.list_names(store.locks) if not locks.is_free(store.locks / name)),
    )


def differences(before: World, after: World) -> list[str]:
    """What is in one and not in the other, one line each; empty when the worlds are equal."""
    lines = []
    for field in World.__dataclass_fields__:
        old, new = getattr(before, field), getattr(after, field)
        lines += [f"{field}: gone: {item}" for item in sorted(old - new, key=str)]
        lines += [f"{field}: new: {item}" for item in sorted(new - old, key=str)]
    return lines


def _domains(host: Host, alive: Record | None) -> list[tuple[str, str, str]]:
    found = []
    for mode in Mode:
        connection = host.connection(mode)
        for domain in connection.handle.listAllDomains():
            is_alive = alive is not None and domain.UUIDString() == str(alive.uuid)
            found.append((connection.uri, domain.name(), "" if is_alive else in_order(domain.XMLDesc(2))))
    return found


def in_order(domain_xml: str) -> str:
    """A definition with its controllers in one order, which means nothing: each has its kind and number.

    Those that libvirt (9.0) adds itself come last in what it has just defined, and in their place once it has read its file
    again, so that a VM looks different after a mere restart of libvirtd.
    """
    domain = ElementTree.fromstring(domain_xml)
    devices = domain.find("devices")
    if devices is not None:
        controllers = devices.findall("controller")
        for controller in controllers:
            devices.remove(controller)
        devices.extend(sorted(controllers, key=lambda item: (item.get("type", ""), int(item.get("index", "0")))))
        for device in devices.iter():  # their indentation is that of another place
            device.tail = None
    return ElementTree.tostring(domain, encoding="unicode")


def _files(root: Path, alive: Record | None) -> list[tuple[str, int, int, str]]:
    """Images are looked at by their facts: their content has a test of its own. What is mounted there is not ours."""
    found, layers = [], set(alive.layers if alive else ())
    owned = {str(alive.uuid), *layers} if alive else set()
    for path in sorted(_walk(root, root.lstat().st_dev, layers)):
        if owned & set(path.parts):
            found.append((str(path.relative_to(root)), 0, 0, ""))
            continue
        with contextlib.suppress(FileNotFoundError):  # it went meanwhile
            facts = path.lstat()
            is_small = path.is_file() and facts.st_size < 4 * 1024**2
            content = files.hash_file(path) if is_small else str(facts.st_size if path.is_file() else "")
            found.append((str(path.relative_to(root)), facts.st_mode, facts.st_uid, content))
    return found


def _walk(root: Path, device: int, layers: set[str]) -> Iterator[Path]:
    """Everything but images' trees, other file systems, and what is in the directories of these layers."""
    for folder, folders, names in os.walk(root):
        yield from (Path(folder, name) for name in (*folders, *names))
        is_ours = Path(folder).name in layers
        folders[:] = [] if is_ours else [name for name in folders if name != "tree" and _device(folder, name) == device]


def _device(folder: str, name: str) -> int:
    """That of a directory; 0 when it went meanwhile."""
    try:
        return os.lstat(f"{folder}/{name}").st_dev
    except FileNotFoundError:
        return 0


def _dns(network: str) -> list[str]:
    """The host lines that dnsmasq reads for this network."""
    folder = Path("/var/lib/libvirt/dnsmasq")
    lines = []
    for path in (folder / f"{network}.hostsfile", folder / f"{network}.addnhosts"):
        lines += path.read_text().splitlines() if path.exists() else []
    return lines


def _processes(root: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if (root in words and "qemu" in words) or "libvirt_lxc --name" in words or "emulator --name" in words:
                found.append(words)
    return found


def _groups() -> set[str]:
    """Those below the folders in which containers' groups are made; the folders themselves stay."""
    folders = [Path(tree, name) for tree in groups.find_hierarchies().values() for name in ("hvctl", "machine")]
    return {str(group) for folder in folders for group in folder.glob("*/")}


def _mounts(root: str) -> set[str]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "mounts").read_text()
            except OSError:
                continue
            found |= {line for line in text.splitlines() if root in line}
    return found


def _filters() -> list[str]:
    done = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, timeout=30, check=True)
    return re.findall(r'"?(hv[0-9a-f]{10})"?', done.stdout)


@contextlib.contextmanager
def visiting(host: Host, prefix: str, *, collects: bool = False) -> Iterator[str]:
    """A free name that begins so, for the block; whatever stands under it, or begins with it, is deleted afterwards.

    Then, with `collects` after a `gc`, everything must be as before, and `gc` find nothing to do.
    """
    free = f"{prefix}-{secrets.token_hex(3)}"
    before = look(host)
    yield free
    for instance in host.instances():
        if instance.name.startswith(free):
            lifecycle.delete(host, instance.name)
    if collects:
        gc.collect(host)
    assert differences(before, look(host)) == []
    assert gc.collect(host) == ()
