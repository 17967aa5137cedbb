"""The root of a container: an overlay whose lower layers are shown with the container's own owners.

    below/N   the image's tree and the read-only layers, shifted to the container's ids; only while the overlay is
              being mounted, which keeps clones of them
    root      the overlay
    mounts/N  directories of the host that the container shares, shifted so that its root is their owner
    mounts/ID volumes (`volumes.py`)

All of it is below the instance's directory, is made before the container starts and unmounted after it has ended, by
libvirt's hook in libvirtd's own mount namespace: that works for `virsh start` and at boot, too.

The writable layer belongs to the container's first id before the overlay is mounted; an owner that is changed later
is not what the mounted overlay checks.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hvctl.hostside import files, ids, layers, mounts, targets
from hvctl.hostside.mounts import Extent
from hvctl.store import Store

TYPE_CHECKING = False  # not typing's, which costs libvirt's hooks more than all else here
if TYPE_CHECKING:
    from hvctl.hostside.volumes import Volume


class Share:
    """A directory of the host for a container: whose files those of the container's root are out there."""

    def __init__(self, source: Path, is_read_only: bool, uid: int, gid: int) -> None:
        self.source = source
        self.is_read_only = is_read_only
        self.uid = uid
        self.gid = gid


class Root:
    """What one container stands on.

    layers: lowest first, the last is written to. first_id: what is root inside is this uid and gid outside; 0: the
    container is privileged, nothing is shifted. size_bytes: what its writable layer may take; 0: as much as there is.
    volumes: each with its identifier.
    """

    def __init__(
        self,
        store: Store,
        uuid: str,
        image_id: str,
        layers: tuple[str, ...],
        first_id: int,
        size_bytes: int = 0,
        shares: tuple[Share, ...] = (),
        volumes: tuple[tuple[str, Volume], ...] = (),
    ) -> None:
        self.store = store
        self.uuid = uuid
        self.directory = store.instances / uuid
        self.image_id = image_id
        self.layers = layers
        self.first_id = first_id
        self.size_bytes = size_bytes
        self.shares = shares
        self.volumes = volumes


def make_layer(path: Path, first_id: int, parent: str = "") -> None:
    """An empty layer on another that a container of these ids can write; fine when it is there."""
    files.make_directory(path, 0o700)
    for name, mode in (("upper", 0o755), ("work", 0o700)):
        files.make_directory(path / name, mode)
        os.chown(path / name, first_id, first_id)
    from hvctl.hostside import quotas  # here: not for libvirt's hooks, which make no layers

    quotas.mark(path)
    # Where the container shares the host's network, libvirt can mount no sysfs, and makes this itself on a read-only /sys.
    for folder in ("sys", "sys/fs", "sys/fs/cgroup"):
        files.make_directory(path / "upper" / folder, 0o755)
        os.chown(path / "upper" / folder, first_id, first_id)
    if parent:
        layers.inherit(path / "upper", path.parent / parent / "upper")
        os.chown(path / "upper", *_shown(path.parent / parent, first_id))
    layers.write_facts(path, layers.Facts(first_id, parent))


def _shown(below: Path, first_id: int) -> tuple[int, int]:
    """The owner and group of a layer's root as a container of these ids has them."""
    facts, written_by = os.lstat(below / "upper"), layers.read_facts(below).first_id
    return facts.st_uid - written_by + first_id, facts.st_gid - written_by + first_id


def mount(root: Root, mount_targets: Iterable[str] = ()) -> None:
    """Mount everything, in the mount namespace of this process; whatever an earlier start left there is taken away.

    `mount_targets`: where in it libvirt will mount something, root and all.

    On failure nothing stays mounted.
    """
    unmount(root.directory)
    if root.size_bytes:
        from hvctl.hostside import quotas  # here: most containers have no limit, and every start waits for this

        quotas.limit(root.store.layer(root.layers[-1]), root.size_bytes)
    try:
        _mount_root(root)
        targets.make_ready(root.directory / "root", root.first_id, mount_targets)
        for number, share in enumerate(root.shares):
            _mount_share(root, share, root.directory / "mounts" / str(number))
        if root.volumes:
            from hvctl.hostside import volumes  # here: as above

            for name, volume in root.volumes:
                volumes.mount(volume, root.directory / "mounts" / name)
    except BaseException:
        unmount(root.directory)
        raise


def unmount(directory: Path) -> None:
    """Take everything away that is mounted below an instance's directory; fine when nothing is."""
    for path in (*_children(directory / "mounts"), directory / "root", *_children(directory / "below")):
        mounts.unmount(path)
        if path.parent.name == "mounts" and not path.name.isdigit():
            # A volume may go to another one now. Containers that began later have copies of the mount in namespaces
            # of their own; the kernel takes those away with the directory (rmdir(2), Linux 3.18).
            files.remove_directory(path)


def add_files(layer: Path, owner: int, folder: str, content: Mapping[str, bytes]) -> None:
    """Put files into a layer that no container has seen yet: 0600, with their directories, its root's."""
    path = layer / "upper"
    for part in folder.split("/"):
        path = path / part
        files.make_directory(path, 0o755)
        os.chown(path, owner, owner)
    for name, data in content.items():
        files.write_file(path / name, data, 0o600)
        os.chown(path / name, owner, owner)


def reset_machine_id(layer: Path, owner: int, below: Sequence[Path]) -> None:
    """Let a layer that no container has seen yet say that there is no machine id; `below`: what it stands on, topmost first.

    Nothing in a tree that a container wrote is followed or opened.
    """
    for tree in below:
        if not os.path.lexists(tree / "etc"):
            continue
        facts = os.lstat(tree / "etc")
        if not stat.S_ISDIR(facts.st_mode):
            return
        etc = layer / "upper" / "etc"
        files.make_directory(etc, stat.S_IMODE(facts.st_mode))
        os.chown(etc, owner, owner)
        files.write_file(etc / "machine-id", b"", 0o444)
        os.chown(etc / "machine-id", owner, owner)
        return


def _mount_root(root: Root) -> None:
    lowers = [(root.store.layer(layer) / "upper", _written_by(root, layer)) for layer in root.layers[:-1]]
    lowers = [(root.store.image_tree(root.image_id), 0), *lowers]
    below = root.directory / "below"
    files.make_directory(below, 0o711)
    names = []
    with contextlib.ExitStack() as stack:
        shifts: dict[int, int] = {}  # a namespace costs a process: one for all layers of the same owners
        for number, (path, written_by) in reversed(list(enumerate(lowers))):
            files.make_directory(below / str(number), 0o711)
            if written_by != root.first_id and written_by not in shifts:
                extents = _shift(written_by, root.first_id)
                shifts[written_by] = stack.enter_context(mounts.open_owners(extents, extents))
            mounts.bind(path, below / str(number), owners=shifts.get(written_by, -1), read_only=True)
            names.append(f"below/{number}")
    files.make_directory(root.directory / "root", 0o711)
    top = f"../../layers/{root.layers[-1]}"
    here = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.chdir(root.directory)
        mounts.overlay(names, f"{top}/upper", f"{top}/work", "root")
    finally:
        os.fchdir(here)
        os.close(here)
    for name in names:
        mounts.unmount(root.directory / name)


def _mount_share(root: Root, share: Share, target: Path) -> None:
    if not share.source.is_dir():
        import shlex  # here: no start waits for it

        source = str(share.source)
        raise OSError(f"the directory {source!r} that it shares is not there; next: mkdir {shlex.quote(source)}")
    files.make_directory(target.parent, 0o711)
    files.make_directory(target, 0o711)
    try:
        _bind(
            share.source,
            target,
            _give(share.uid, root.first_id),
            _give(share.gid, root.first_id),
            read_only=share.is_read_only,
        )
    except OSError:
        # A file system that cannot be shifted (NFS, an overlay): shared as it is, its owners are nobody inside.
        mounts.bind(share.source, target, read_only=share.is_read_only)


def _give(owner: int, first_id: int) -> tuple[Extent, ...]:
    """Show this owner as the container's root. The container's other ids stay what they are: nobody's outside."""
    return (Extent(owner, first_id, 1), Extent(first_id + 1, first_id + 1, ids.COUNT - 1)) if first_id else ()


def _shift(stored: int, shown: int) -> tuple[Extent, ...]:
    return (Extent(stored, shown, ids.COUNT),) if stored != shown else ()


def _bind(source: Path, target: Path, uids: tuple[Extent, ...], gids: tuple[Extent, ...], *, read_only: bool) -> None:
    if not uids:
        mounts.bind(source, target, read_only=read_only)
        return
    with mounts.open_owners(uids, gids) as owners:
        mounts.bind(source, target, owners=owners, read_only=read_only)


def _written_by(root: Root, layer: str) -> int:
    """The first id of the container that wrote a layer."""
    return layers.read_facts(root.store.layer(layer)).first_id


def _children(path: Path) -> list[Path]:
    return [path / name for name in files.list_names(path)]
