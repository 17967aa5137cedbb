"""Virtual machines: a qcow2 overlay on the image's disk, a kernel of its own, identity through fw_cfg."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from xml.etree import ElementTree

from hvctl import accel
from hvctl.access import agent
from hvctl.access.agent import ExecResult
from hvctl.backends import processes
from hvctl.backends.base import ENVIRONMENT, Backend, Secrets, Values, credentials
from hvctl.backends.layers import Layers
from hvctl.backends.vmdisks import VmDisks
from hvctl.backends.vmlayers import VmLayers
from hvctl.errors import HostError, HvctlError, InvalidSpec
from hvctl.events import Sink
from hvctl.host import Host
from hvctl.hostside import files, machine, streams
from hvctl.hostside.streams import Streams
from hvctl.libvirtapi import domains
from hvctl.model import Accelerator, Artefact, Firmware, Image, Mode, Provision, Record, Spec
from hvctl.rootfs import application
from hvctl.units import MIB, TIB, format_size

if TYPE_CHECKING:
    from hvctl.backends.conversion import Conversion
    from hvctl.rootfs.building import Building

_PING_TIMEOUT_S = 2
# A disk is plugged into a port that was there from the start. Six are for what a VM has at most, the rest for disks that
# come while it runs; at its next start it has as many as it needs. Each costs the guest's boot some devices to look at.
_PCIE_PORTS = 12
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
    noun: ClassVar[str] = "a VM"
    least_memory_bytes: ClassVar[int] = _LEAST_MEMORY_BYTES
    layers: ClassVar[Layers] = VmLayers()
    example: ClassVar[Mapping[str, Any]] = {"accelerator": Accelerator.TCG, "kernel_release": "6.1.0-1-cloud-amd64"}
    disks: ClassVar[VmDisks] = VmDisks()

    @property
    def conversion(self) -> Conversion:
        from hvctl.backends.vmconversion import VmConversion

        return VmConversion()

    def plan(self, host: Host, record: Record, image: Image, *, require_kvm: bool) -> tuple[Record, str]:
        accelerator, reason = accel.choose(host, record.spec.accel, require_kvm=require_kvm)
        kernel_release = image.kernel_release if image.kernel else ""
        return replace(record, accelerator=accelerator, kernel_release=kernel_release), f"accelerator {reason}"

    def complete_image(self, host: Host, image: Image, events: Sink, *, is_trusted: bool = False) -> Image:
        if image.disk is not None:
            return image
        from hvctl.rootfs import halves

        return halves.ensure_disk(host, image, events)

    def format_stub(self, record: Record) -> str:
        domain = ElementTree.Element("domain", {"type": "qemu"})
        for tag, text in (("name", record.name), ("uuid", str(record.uuid)), ("memory", "1024")):
            ElementTree.SubElement(domain, tag).text = text
        ElementTree.SubElement(ElementTree.SubElement(domain, "os"), "type", {"arch": "x86_64"}).text = "hvm"
        return ElementTree.tostring(domain, encoding="unicode")

    def choose_template(self, image: Image) -> str:
        """Firmware matters to a disk with a boot loader of its own alone."""
        if image.firmware is Firmware.UEFI and image.kernel is None:
            return "uefi"
        return super().choose_template(image)

    def check_image(self, image: Image) -> None:
        if image.disk is None and image.has_tree:
            raise InvalidSpec(
                f"image {image.name!r} has no disk yet: the first VM of it makes one", hint="leave --print-xml away"
            )
        if image.disk is None:
            raise InvalidSpec(
                f"image {image.name!r} has no disk, so it cannot run as a VM", hint="see what it has: hvctl image show"
            )

    def check_disk(self, host: Host, spec: Spec, image: Image) -> None:
        assert image.disk is not None
        if spec.disk_bytes < image.disk.virtual_bytes:
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

    def check_accelerator(self) -> None:
        return

    def check_kernel(self) -> None:
        return

    def check_block_disks(self) -> None:
        return

    def check_throttle(self) -> None:
        return

    def check_memory(self) -> None:
        return

    def check_takeover(self) -> None:
        return

    def list_differences(
        self, host: Host, record: Record, image: Image, tops: tuple[str, str], events: Sink
    ) -> list[tuple[str, str]]:
        from hvctl.backends import vmdifferences

        return vmdifferences.list_differences(host, record, image, tops, events)

    def create_files(self, host: Host, record: Record, image: Image, secrets: Secrets) -> None:
        self.dress(host, record, secrets)
        if secrets.process is not None:
            self._create_application(host, record, secrets)
        self.add_seed(host, record, secrets)
        for artefact, path in _boot_files(host, record, image):
            host.shell.call(files.clone_file, host.store.image(image.id) / artefact.file, path, 0o444)

    def dress(self, host: Host, record: Record, secrets: Secrets) -> None:
        store, call = host.store, host.shell.call
        for path in (store.instance(record.uuid), store.identity(record.uuid)):
            call(files.make_directory, path, 0o711)
            call(files.set_owner, path, 0, 0)
        for name, content in credentials(record, secrets).items():
            call(files.write_file, store.identity(record.uuid) / name, content, 0o600)

    def add_seed(self, host: Host, record: Record, secrets: Secrets) -> None:
        if secrets.user_data or record.provision is Provision.NOCLOUD:
            from hvctl import seed

            content = seed.make_nocloud(record, secrets.host_key, secrets.user_data, is_copy=secrets.is_copy)
            host.shell.call(files.write_file, host.store.seed(record.uuid), content, 0o600)

    def _create_application(self, host: Host, record: Record, secrets: Secrets) -> None:
        """What its init is given, as archives that QEMU hands over, and where its ports end."""
        store, call = host.store, host.shell.call
        call(files.make_directory, store.application(record.uuid), 0o711)
        call(files.make_directory, store.output(record.uuid), 0o711)
        given = processes.format_files(host, record, secrets)
        names = application.format_names(record, record.address)
        rest = {name: content for name, content in given.items() if name not in names}
        for name, content in (("application", rest), ("names", names)):
            call(files.write_file, store.application(record.uuid) / name, application.pack(content), 0o600)

    def open_streams(self, host: Host, record: Record) -> Streams:
        try:
            return host.shell.call(streams.connect, host.store.output(record.uuid))
        except OSError as error:
            raise HostError(
                f"cannot reach the ports of {record.name!r}: {error.strerror or error}",
                hint=f"hvctl logs {record.name}",
            ) from error

    def create_root(self, host: Host, record: Record, image: Image, secrets: Secrets) -> None:
        self.layers.create(host, record, image, record.layers[-1], "")

    def hold(self, host: Host, record: Record) -> str:
        from hvctl.backends import vmimage

        return vmimage.hold(host, self._domain(host, record))

    def release(self, host: Host, record: Record) -> None:
        from hvctl.backends import vmimage

        vmimage.release(host, self._domain(host, record))

    def copy_top(self, host: Host, record: Record, target: Path) -> None:
        host.shell.call(files.make_directory, target, 0o700)
        source = host.store.layer_disk(record.layers[-1])
        host.shell.call(files.clone_file, source, target / source.name, 0o600)

    def export_root(self, work: Building, record: Record, image: Image, top: Path, *, keep_identity: bool) -> Image:
        from hvctl.backends import vmimage

        return vmimage.export_root(work, record, image, top / "disk.qcow2", keep_identity=keep_identity)

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
            "cpuset": spec.cpuset,
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
            "pcie_ports": tuple(range(1, _PCIE_PORTS + 1)),
            "network": record.network,
            "mac": record.mac,
            "device": record.device,
            "console_log": str(store.console_log(uuid)),
            "application": str(store.application(uuid)),
            "output": str(store.output(uuid)),
            "is_attached": spec.is_ephemeral,
        }

    def finish_xml(self, host: Host, record: Record, image: Image, xml: str) -> str:
        """Name the whole backing chain, each file as one that libvirt must not give to the qemu user."""
        return self.layers.restack(host, record, image, xml)

    def rename(self, host: Host, record: Record, name: str) -> None:
        domains.rename(self._domain(host, record), name)

    def finish_rename(self, host: Host, record: Record) -> None:
        """libvirt renames at once or not at all."""

    def undo_rename(self, host: Host, record: Record) -> None:
        """libvirt renames at once or not at all."""

    def write_name(self, host: Host, record: Record) -> None:
        if record.is_application:
            content = application.pack(application.format_names(record, record.address))
            host.shell.call(files.write_file, host.store.application(record.uuid) / "names", content, 0o600)
            return
        path = host.store.identity(record.uuid) / "hvctl.name"
        host.shell.call(files.write_file, path, record.name.encode(), 0o600)

    def run_inside(self, host: Host, record: Record, argv: tuple[str, ...], stdin: bytes) -> ExecResult:
        if record.is_application:
            self.check_application_exec()
        return agent.run(self._domain(host, record), argv, ENVIRONMENT, stdin, host.pause)

    def attach(self, host: Host, record: Record, argv: tuple[str, ...], *, with_terminal: bool | None) -> int:
        if record.is_application:
            self.check_application_exec()
        if with_terminal:
            self.check_terminal()
        stdin = b"" if sys.stdin.isatty() else sys.stdin.buffer.read(agent.STDIN_LIMIT_BYTES + 1)
        result = self.run_inside(host, record, argv, stdin)
        for stream, content in ((sys.stdout, result.stdout), (sys.stderr, result.stderr)):
            stream.buffer.write(content)
            stream.buffer.flush()
        return result.status

    def answers(self, host: Host, record: Record) -> bool:
        try:
            agent.ping(self._domain(host, record), timeout_s=_PING_TIMEOUT_S)
        except HvctlError:
            return False
        return True

    def has_booted(self, host: Host, record: Record, *, log_start: int) -> bool:
        return self.measure_log(host, record) > log_start

    def is_up(self, host: Host, record: Record, *, log_start: int) -> bool:
        return self.has_booted(host, record, log_start=log_start)

    def measure_log(self, host: Host, record: Record) -> int:
        return 0 if record.is_application else host.shell.call(files.size, host.store.console_log(record.uuid))

    def measure_memory(self, host: Host, record: Record) -> int:
        return domains.get_resident_bytes(self._domain(host, record))

    def read_log(self, host: Host, record: Record, *, limit_bytes: int) -> bytes:
        if record.is_application and (printed := processes.read_log(host, record, limit_bytes=limit_bytes)):
            return printed
        path = host.store.console_log(record.uuid)
        if not host.shell.call(files.exists, path):
            return b""
        return host.shell.call(files.read_tail, path, limit_bytes=limit_bytes)

    def resize_live(self, host: Host, record: Record, field_name: str) -> None:
        domain, spec = self._domain(host, record), record.spec
        change = {"cpus": (domains.set_vcpus, spec.cpus), "memory": (domains.set_memory, spec.memory_bytes)}
        function, value = change[field_name]
        function(domain, value)

    def _domain(self, host: Host, record: Record) -> Any:
        return domains.get(host.connection(self.mode), record.uuid)


def _boot_files(host: Host, record: Record, image: Image) -> list[tuple[Artefact, Path]]:
    if image.kernel is None or image.initrd is None:
        return []
    return [(image.kernel, host.store.kernel(record.uuid)), (image.initrd, host.store.initrd(record.uuid))]
