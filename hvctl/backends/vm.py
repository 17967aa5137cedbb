"""Virtual machines: a qcow2 overlay on the image's disk, a kernel of its own, identity through fw_cfg."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar
from xml.etree import ElementTree

from hvctl.access import agent
from hvctl.access.agent import ExecResult
from hvctl.backends.base import Backend, Secrets, Values
from hvctl.errors import HostError, InvalidSpec
from hvctl.host import Host
from hvctl.hostside import files, machine
from hvctl.libvirtapi import domains
from hvctl.model import Accelerator, Artefact, Image, Mode, Provision, Record, Spec
from hvctl.units import MIB, TIB, format_size

_QEMU_IMG_TIMEOUT_S = 60
# Less, or more, is a slip of the pen rather than a wish.
_LEAST_MEMORY_BYTES = 128 * MIB
_LARGEST_DISK_BYTES = 16 * TIB

# UEFI code and variables, without secure boot (its build refuses a kernel that is booted directly and not signed):
# Debian and Ubuntu, Fedora's family, Arch.
_FIRMWARE = (
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
)


class VmBackend(Backend):
    """libvirt's QEMU driver."""

    mode: ClassVar[Mode] = Mode.VM

    def format_stub(self, record: Record) -> str:
        domain = ElementTree.Element("domain", {"type": "qemu"})
        for tag, text in (("name", record.name), ("uuid", str(record.uuid)), ("memory", "1024")):
            ElementTree.SubElement(domain, tag).text = text
        ElementTree.SubElement(ElementTree.SubElement(domain, "os"), "type", {"arch": "x86_64"}).text = "hvm"
        return ElementTree.tostring(domain, encoding="unicode")

    def check(self, host: Host, record: Record, image: Image) -> None:
        spec = record.spec
        if image.disk is None:
            raise InvalidSpec(
                f"image {image.name!r} has no disk, so it cannot run as a VM", hint="see what it has: hvctl image show"
            )
        if spec.disk_bytes and spec.disk_bytes < image.disk.virtual_bytes:
            raise InvalidSpec(
                f"a disk of {format_size(spec.disk_bytes)} is smaller than image {image.name!r} "
                f"({format_size(image.disk.virtual_bytes)})",
                hint=f"--disk {format_size(image.disk.virtual_bytes)} or more",
            )
        if spec.disk_bytes > _LARGEST_DISK_BYTES:
            raise InvalidSpec(
                f"a disk of {format_size(spec.disk_bytes)} is not possible",
                hint=f"--disk {format_size(_LARGEST_DISK_BYTES)} or less",
            )
        self.check_size(spec)

    def check_size(self, spec: Spec) -> None:
        if spec.memory_bytes < _LEAST_MEMORY_BYTES:
            raise InvalidSpec(
                f"{format_size(spec.memory_bytes)} of memory is too little for a VM",
                hint=f"--memory {format_size(_LEAST_MEMORY_BYTES)} or more",
            )
        _check_fits(spec.memory_bytes, spec.cpus)

    def create_files(self, host: Host, record: Record, image: Image, secrets: Secrets) -> None:
        store, call = host.store, host.shell.call
        call(files.make_directory, store.instance(record.uuid), 0o711)
        call(files.make_directory, store.identity(record.uuid), 0o711)
        for name, content in _credentials(record, secrets).items():
            call(files.write_file, store.identity(record.uuid) / name, content, 0o600)
        if secrets.user_data or record.provision is Provision.NOCLOUD:
            from hvctl import seed

            content = seed.make_nocloud(record, secrets.host_key, secrets.user_data)
            call(files.write_file, store.seed(record.uuid), content, 0o600)
        for artefact, path in _boot_files(host, record, image):
            call(files.clone_file, store.image(image.id) / artefact.file, path, 0o444)

    def create_root(self, host: Host, record: Record, image: Image) -> None:
        assert image.disk is not None
        layer = record.layers[-1]
        host.shell.call(files.make_directory, host.store.layer(layer), 0o711)
        size_bytes = record.spec.disk_bytes or image.disk.virtual_bytes
        base = host.store.image(image.id) / image.disk.artefact.file
        disk = host.store.layer_disk(layer)
        host.shell.run(
            [
                "qemu-img",
                "create",
                "-q",
                "-f",
                "qcow2",
                "-F",
                image.disk.format,
                "-b",
                base,
                "--",
                disk,
                str(size_bytes),
            ],
            timeout_s=_QEMU_IMG_TIMEOUT_S,
        )
        host.shell.call(files.set_mode, disk, 0o600)

    def format_values(self, host: Host, record: Record, image: Image) -> Values:
        store, spec, uuid = host.store, record.spec, record.uuid
        is_kvm = record.accelerator is Accelerator.KVM
        has_kernel = bool(record.kernel_release)
        has_seed = host.shell.call(files.exists, store.seed(uuid))
        firmware = host.shell.call(machine.find_pair, _FIRMWARE)
        arguments = (
            *image.kernel_arguments,
            # Emulated code cannot be speculated on, and the mitigations cost a twelfth of a boot.
            *(() if is_kvm else ("mitigations=off",)),
            *(() if has_seed else ("cloud-init=disabled",)),
        )
        names = ("hvctl.name", "hvctl.host_key", "hvctl.authorized_keys")
        return {
            "name": record.name,
            "uuid": str(uuid),
            "domain_type": "kvm" if is_kvm else "qemu",
            "cpu_mode": "host-passthrough" if is_kvm else "maximum",
            # 5-level paging costs a fifth of the kernel's boot under emulation and serves nobody below 64 TiB.
            "disabled_cpu_features": () if is_kvm else ("la57",),
            "memory_kib": spec.memory_bytes // 1024,
            "cpus": spec.cpus,
            "kernel": str(store.kernel(uuid)) if has_kernel else "",
            "initrd": str(store.initrd(uuid)) if has_kernel else "",
            "kernel_arguments": " ".join(arguments),
            "disk": str(store.layer_disk(record.layers[-1])),
            "seed": str(store.seed(uuid)) if has_seed else "",
            "nvram": str(store.nvram(uuid)),
            "firmware_code": firmware[0],
            "firmware_variables": firmware[1],
            "nested_cpu_features": host.shell.call(machine.virtualisation_features) if is_kvm else ("svm",),
            "credentials": tuple((name, str(store.identity(uuid) / name)) for name in names),
            "network": record.network,
            "mac": record.mac,
            "device": record.device,
            "console_log": str(store.console_log(uuid)),
        }

    def finish_xml(self, host: Host, record: Record, image: Image, xml: str) -> str:
        """Name the whole backing chain, each file as one that libvirt must not give to the qemu user."""
        assert image.disk is not None
        domain = ElementTree.fromstring(xml)
        top = str(host.store.layer_disk(record.layers[-1]))
        below = [(str(host.store.layer_disk(layer)), "qcow2") for layer in reversed(record.layers[:-1])]
        below.append((str(host.store.image(image.id) / image.disk.artefact.file), image.disk.format))
        for disk in domain.iterfind("./devices/disk"):
            source = disk.find("source")
            if source is not None and source.get("file") == top:
                _add_backing(disk, below)
        ElementTree.indent(domain)
        return ElementTree.tostring(domain, encoding="unicode") + "\n"

    def rename(self, host: Host, record: Record, name: str) -> None:
        domains.rename(domains.get(host.connection(self.mode), record.uuid), name)

    def write_name(self, host: Host, record: Record) -> None:
        path = host.store.identity(record.uuid) / "hvctl.name"
        host.shell.call(files.write_file, path, record.name.encode(), 0o600)

    def run_inside(self, host: Host, record: Record, argv: tuple[str, ...], stdin: bytes) -> ExecResult:
        return agent.run(domains.get(host.connection(self.mode), record.uuid), argv, stdin, host.pause)


def _check_fits(memory_bytes: int, cpus: int) -> None:
    total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if memory_bytes > total_bytes:
        raise HostError(
            f"{format_size(memory_bytes)} of memory is more than this host has ({format_size(total_bytes)})",
            hint="ask for less with --memory",
        )
    most = 4 * (os.cpu_count() or 1)
    if not 1 <= cpus <= most:
        raise InvalidSpec(
            f"{cpus} CPUs is not possible on this host with {os.cpu_count()} of its own", hint=f"--cpus 1 to {most}"
        )


def _credentials(record: Record, secrets: Secrets) -> dict[str, bytes]:
    return {
        "hvctl.name": record.name.encode(),
        "hvctl.host_key": secrets.host_key,
        "hvctl.authorized_keys": "".join(f"{key}\n" for key in record.authorized_keys).encode(),
    }


def _boot_files(host: Host, record: Record, image: Image) -> list[tuple[Artefact, Path]]:
    if image.kernel is None or image.initrd is None:
        return []
    return [(image.kernel, host.store.kernel(record.uuid)), (image.initrd, host.store.initrd(record.uuid))]


def _add_backing(disk: ElementTree.Element, chain: list[tuple[str, str]]) -> None:
    for old in disk.findall("backingStore"):
        disk.remove(old)
    parent = disk
    for path, format_ in chain:
        level = ElementTree.Element("backingStore", {"type": "file"})
        ElementTree.SubElement(level, "format", {"type": format_})
        source = ElementTree.SubElement(level, "source", {"file": path})
        ElementTree.SubElement(source, "seclabel", {"model": "dac", "relabel": "no"})
        at = [child.tag for child in parent].index("source") + 1
        parent.insert(at, level)
        parent = level
    ElementTree.SubElement(parent, "backingStore")
