"""From a container to a VM: what its layers show becomes one file system, on a disk of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hvctl.backends import rootlimits, vmlayers
from hvctl.backends.conversion import USER_DATA_LIMIT_BYTES, Conversion, Taken, instance_data
from hvctl.events import Note
from hvctl.host import Host
from hvctl.hostside import files, flatten, layers
from hvctl.model import AccelChoice, Image, Mode, Record, Spec
from hvctl.rootfs import filesystem, intake, treedisk
from hvctl.rootfs.building import Building
from hvctl.shell.base import Argument
from hvctl.units import MIB, format_size

_COPY_TIMEOUT_S = 7200
_RESERVE_BYTES = 256 * MIB


class VmConversion(Conversion):
    """Coming to a VM, and leaving it."""

    def list_losses(self, host: Host, record: Record) -> list[str]:
        lost = [f"its own kernel{f' ({record.kernel_release})' if record.kernel_release else ''}: this host's runs it"]
        if host.shell.call(files.exists, host.store.nvram(record.uuid)):
            lost.append("the variables of its UEFI firmware")
        if vmlayers.has_tpm(host, record):
            lost.append("the state of its TPM, and all that is sealed by it")
        if record.spec.disk_bytes and (obstacle := rootlimits.find_obstacle(host)):
            lost.append(
                f"the size of its disk, {format_size(record.spec.disk_bytes)}, while it is a container: {obstacle}"
            )
        if record.spec.accel is not AccelChoice.AUTO:
            lost.append(f"the choice of an accelerator ({record.spec.accel})")
        return lost

    def adopt(self, spec: Spec) -> Spec:
        return replace(spec, mode=Mode.VM, mounts=(), is_privileged=False, processes=0, template="", variables=())

    def measure(self, host: Host, record: Record, image: Image) -> int:
        """All of it three times: as a tree, as a file system, as a disk."""
        return 3 * _measure_used(host, record, image) + _RESERVE_BYTES

    def take_root(self, work: Building, source: Record, record: Record, image: Image) -> Taken:
        assert image.disk is not None
        host, call = work.host, work.host.shell.call
        tree = work.directory / "tree"
        lowers = [(host.store.image_tree(image.id), 0)]
        for layer in source.layers:
            first_id = call(layers.read_facts, host.store.layer(layer)).first_id
            lowers.append((host.store.layer_upper(layer), first_id))
        call(files.make_directory, tree, 0o700)
        work.tell("copying its root", 5)
        host.shell.run(flatten.command(work.directory, lowers, tree), timeout_s=_COPY_TIMEOUT_S)
        kernel = treedisk.choose_kernel(host, image, tree)
        if kernel.lender is not None:
            work.events(Note(source.name, f"it gets the kernel {kernel.release} of {kernel.origin}"))
        wanted = record.spec.disk_bytes or image.disk.virtual_bytes
        size_bytes = max(wanted, image.disk.virtual_bytes, treedisk.choose_size(call(files.disk_usage, tree)))
        modules = treedisk.find_missing_modules(host, tree, kernel)
        work.tell("making the file system", 30)
        raw = filesystem.make_raw(work, tree, virtual_bytes=size_bytes, modules=modules)
        work.tell("making the disk", 60)
        _make_layer(work, image, raw.path, record.layers[0])
        treedisk.place_boot_files(host, tree, kernel, host.store.instance(record.uuid))
        data = intake.read_in_tree(host, tree, instance_data(record), limit_bytes=USER_DATA_LIMIT_BYTES)
        disk_bytes = record.spec.disk_bytes if size_bytes == wanted else size_bytes
        return Taken(
            record=replace(record, spec=replace(record.spec, disk_bytes=disk_bytes), kernel_release=kernel.release),
            image=replace(image, kernel_release=kernel.release, kernel_arguments=kernel.arguments),
            user_data=data or b"",
        )

    def shed(self, host: Host, record: Record) -> None:
        folder, call = host.store.instance(record.uuid), host.shell.call
        log = host.store.console_log(record.uuid).name
        logs = [name for name in call(files.list_names, folder) if name.startswith(log)]  # virtlogd's rotated ones
        own = (host.store.kernel, host.store.initrd, host.store.seed, host.store.nvram)
        for name in (*logs, *(path(record.uuid).name for path in own)):
            call(files.remove, folder / name)


def _measure_used(host: Host, record: Record, image: Image) -> int:
    call, store = host.shell.call, host.store
    own_bytes = sum(call(files.disk_usage, store.layer(layer)) for layer in record.layers)
    return own_bytes + call(files.disk_usage, store.image_tree(image.id))


def _make_layer(work: Building, image: Image, raw: Path, layer: str) -> None:
    """The disk as a layer that hides all of the image's: where this one has nothing, it says zeros."""
    host, call = work.host, work.host.shell.call
    base, format_ = vmlayers.base_of(host, image)
    aside = work.directory / "layer"
    call(files.make_directory, aside, 0o711)
    disk = aside / "disk.qcow2"
    words: list[Argument] = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-B", base, "-F", format_]
    host.shell.run([*words, "--", raw, disk], timeout_s=_COPY_TIMEOUT_S)
    call(layers.seal, disk, vmlayers.find_reader(host))
    call(layers.write_facts, aside, layers.Facts())
    call(files.publish, aside, host.store.layer(layer))
