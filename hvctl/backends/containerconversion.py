"""From a VM to a container: what its disk has otherwise than the image's tree becomes a layer on that tree.

The disk is read as foreign disks are (`rootfs/rawdisk.py`): by a confined program, never by this kernel.
"""

from __future__ import annotations

from dataclasses import replace

from hvctl.backends import vmimage
from hvctl.backends.conversion import USER_DATA_LIMIT_BYTES, Conversion, Taken, instance_data
from hvctl.errors import InvalidSpec, Unsupported
from hvctl.host import Host
from hvctl.hostside import files, inroot, layers, roots
from hvctl.model import AccelChoice, Image, Mode, Record, Spec
from hvctl.rootfs import intake
from hvctl.rootfs.building import Building
from hvctl.units import MIB, format_size

_ARCHIVE = "changes.tar"
# What a container does not miss: room for boot loaders, swap.
_WITHOUT_DATA = ("", "FAT", "swap")
_RESERVE_BYTES = 256 * MIB


class ContainerConversion(Conversion):
    """Coming to a container, and leaving it."""

    def list_losses(self, host: Host, record: Record) -> list[str]:
        spec = record.spec
        lost = [f"the directory {mount.source} of this host at {mount.target}" for mount in spec.mounts]
        if spec.is_privileged:
            lost.append("--privileged: its root is no longer this host's")
        if spec.processes:
            lost.append(f"the limit of {spec.processes} processes")
        return lost

    def adopt(self, spec: Spec) -> Spec:
        return replace(spec, mode=Mode.CONTAINER, accel=AccelChoice.AUTO, template="", variables=())

    def measure(self, host: Host, record: Record, image: Image) -> int:
        """A raw copy of all that is on its disk; what changed twice, as an archive and as files."""
        own_bytes = sum(host.shell.call(files.disk_usage, host.store.layer(layer)) for layer in record.layers)
        base_bytes = image.disk.artefact.size_bytes if image.disk else 0
        return base_bytes + 3 * own_bytes + _RESERVE_BYTES

    def take_root(self, work: Building, source: Record, record: Record, image: Image) -> Taken:
        host, call = work.host, work.host.shell.call
        work.tell("copying the disk", 5)
        raw = vmimage.copy_disk(work, source, image, host.store.layer_disk(source.layers[-1]))
        work.tell("looking for its root", 30)
        root, parts = raw.find_root()
        if root is None:
            found = ", ".join(part.problem or part.kind or "unknown" for part in parts)
            raise InvalidSpec(
                f"{source.name!r} cannot become a container: there is no Linux root on its disk (found: {found[:200]})",
                hint="it stays a VM",
            )
        if not root.is_root:
            problem = f" ({root.problem})" if root.problem else ""
            raise Unsupported(
                f"{source.name!r} has its root on {root.kind}{problem}, which only a kernel could read",
                hint="it stays a VM: only ext2, ext3 and ext4 can be converted",
            )
        work.tell("comparing it with the image", 40)
        tree, aside = host.store.image_tree(image.id), work.directory / "layer"
        gone = raw.pack_changes(root, tree, _ARCHIVE, _list_lent(host, source, image))
        call(files.remove, raw.path)
        work.tell("writing what differs", 75)
        call(files.make_directory, aside, 0o700)
        intake.unpack_tree(host, work.directory / _ARCHIVE, aside / "upper", subject=source.name)
        call(layers.add_whiteouts, aside / "upper", gone)
        # Owners are those inside, as in an image's tree.
        call(layers.write_facts, aside, layers.Facts())
        call(files.publish, aside, host.store.layer(record.layers[0]))
        upper = host.store.layer_upper(record.layers[0])
        data = intake.read_in_tree(host, upper, instance_data(record), limit_bytes=USER_DATA_LIMIT_BYTES)
        others = [part for part in parts if part != root and part.kind not in _WITHOUT_DATA]
        left_behind = ", ".join(f"{part.kind}, {format_size(part.size)}" for part in others)
        return Taken(record=record, image=image, user_data=data or b"", left_behind=left_behind)

    def shed(self, host: Host, record: Record) -> None:
        """Its mount points. What is mounted there is not removed: a directory that is not empty stays."""
        folder, call = host.store.instance(record.uuid), host.shell.call
        call(roots.unmount, folder)
        for name in ("mounts", "below"):
            for inner in call(files.list_names, folder / name):
                call(files.remove_directory, folder / name / inner)
        for name in ("mounts", "below", "root"):
            call(files.remove_directory, folder / name)


def _list_lent(host: Host, source: Record, image: Image) -> list[str]:
    """The modules of the kernel that a VM was lent: the image's tree has none, and a container needs none."""
    if not source.kernel_release:
        return []
    places = [f"{folder}/modules/{source.kernel_release}" for folder in ("usr/lib", "lib")]
    tree = host.store.image_tree(image.id)
    return [] if host.shell.call(inroot.find, tree, places) else places
