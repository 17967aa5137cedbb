"""System containers: an overlay on the image's tree, ids of its own, identity through a directory bound into it.

The root is mounted and unmounted by libvirt's `lxc` hook (`hostside/hook.py`), so that a start works without hvctl.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from xml.etree import ElementTree

from hvctl import metadata, seed
from hvctl.access.agent import ExecResult
from hvctl.backends import places, processes, rootlimits
from hvctl.backends.base import ENVIRONMENT, Backend, Secrets, Values, credentials
from hvctl.backends.containerdisks import ContainerDisks
from hvctl.backends.containerlayers import ContainerLayers, pause, resume
from hvctl.errors import HostError, HvctlError, InvalidSpec, LibvirtFailed, NotFound, WrongState
from hvctl.events import Sink
from hvctl.host import Host
from hvctl.hostside import confine, daemons, emulator, enter, files, held, ids, roots, streams
from hvctl.hostside.streams import Streams
from hvctl.libvirtapi import domains
from hvctl.model import AccelChoice, Image, Mode, Provision, Record, Spec, State
from hvctl.rootfs import application
from hvctl.units import MIB, format_size

if TYPE_CHECKING:
    from hvctl.backends.conversion import Conversion
    from hvctl.rootfs.building import Building

_PERIOD_US = 100_000
_COPY_TIMEOUT_S = 7200
_INIT = "/sbin/init"
_END_TIMEOUT_S = 10.0
# Debian 12 boots, and sshd answers, with 14 (ten times of ten), never with 12; others start more.
_LEAST_PROCESSES = 24


class ContainerBackend(Backend):
    """libvirt's LXC driver."""

    mode: ClassVar[Mode] = Mode.CONTAINER
    noun: ClassVar[str] = "a container"
    least_memory_bytes: ClassVar[int] = 32 * MIB  # libvirt_lxc itself counts, and needs 20
    layers: ClassVar[ContainerLayers] = ContainerLayers()
    example: ClassVar[Mapping[str, Any]] = {"first_id": 0x70000000}
    disks: ClassVar[ContainerDisks] = ContainerDisks()

    @property
    def conversion(self) -> Conversion:
        from hvctl.backends.containerconversion import ContainerConversion

        return ContainerConversion()

    def plan(self, host: Host, record: Record, image: Image, *, require_kvm: bool) -> tuple[Record, str]:
        if require_kvm or record.spec.accel is not AccelChoice.AUTO:
            self.check_accelerator()
        return record, "privileged: its root is this host's root" if record.spec.is_privileged else ""

    def complete_image(self, host: Host, image: Image, events: Sink, *, is_trusted: bool = False) -> Image:
        if image.has_tree:
            return image
        from hvctl.rootfs import halves

        return halves.ensure_tree(host, image, events, is_trusted=is_trusted)

    def format_stub(self, record: Record) -> str:
        domain = ElementTree.Element("domain", {"type": "lxc"})
        for tag, text in (("name", record.name), ("uuid", str(record.uuid)), ("memory", "1024")):
            ElementTree.SubElement(domain, tag).text = text
        system = ElementTree.SubElement(domain, "os")
        ElementTree.SubElement(system, "type").text = "exe"
        ElementTree.SubElement(system, "init").text = "/nonexistent"
        return ElementTree.tostring(domain, encoding="unicode")

    def check_image(self, image: Image) -> None:
        if not image.has_tree and image.disk is not None:
            raise InvalidSpec(
                f"image {image.name!r} has no tree yet: the first container of it makes one",
                hint="leave --print-xml away",
            )
        if not image.has_tree:
            raise InvalidSpec(
                f"image {image.name!r} has no root tree, so it cannot run as a container",
                hint="see what it has: hvctl image show",
            )

    def check_disk(self, host: Host, spec: Spec, image: Image) -> None:
        rootlimits.check(host, spec.disk_bytes)

    def check_privileged(self) -> None:
        return

    def check_processes(self, spec: Spec, image: Image) -> None:
        if image.process is None and spec.processes < _LEAST_PROCESSES:
            raise InvalidSpec(
                f"a whole system does not boot with {spec.processes} processes",
                hint=f"--processes {_LEAST_PROCESSES} or more",
            )

    def check_terminal(self) -> None:
        return

    def check_application_exec(self) -> None:
        return

    def check_directory_volumes(self) -> None:
        return

    def list_differences(
        self, host: Host, record: Record, image: Image, tops: tuple[str, str], events: Sink
    ) -> list[tuple[str, str]]:
        return self.layers.list_differences(host, record, tops)

    def check_mounts(self, host: Host, spec: Spec, image: Image) -> None:
        places.check_mounts(host, spec, image)

    @contextlib.contextmanager
    def allocate(self, host: Host, record: Record) -> Iterator[Record]:
        if record.spec.is_privileged:
            yield replace(record, first_id=0)
            return
        with ids.choosing():
            taken = [*host.shell.call(ids.list_delegated), *domains.list_id_ranges(host.connection(self.mode))]
            yield replace(record, first_id=host.shell.call(ids.find_free, taken))

    def create_files(self, host: Host, record: Record, image: Image, secrets: Secrets) -> None:
        self.dress(host, record, secrets)
        if secrets.process is not None:
            self._create_application(host, record, secrets)

    def dress(self, host: Host, record: Record, secrets: Secrets) -> None:
        store, call = host.store, host.shell.call
        # The container's root comes here for its mounts; no other user does, to whom a shared directory or a setuid
        # program would be open that its own path keeps closed.
        for path, mode in ((store.instance(record.uuid), 0o710), (store.identity(record.uuid), 0o750)):
            call(files.make_directory, path, mode)
            call(files.set_owner, path, 0, record.first_id or 0)
        if secrets.process is None:
            for name, content in credentials(record, secrets).items():
                self._write_identity(host, record, name, content)

    def _create_application(self, host: Host, record: Record, secrets: Secrets) -> None:
        """What its root may read but not change, and where its init writes."""
        store, call, owner = host.store, host.shell.call, record.first_id or 0
        given, output = store.application(record.uuid), store.output(record.uuid)
        for path, mode, uid in ((given, 0o750, 0), (output, 0o700, owner)):
            call(files.make_directory, path, mode)
            call(files.set_owner, path, uid, owner)
        for name, content in processes.format_files(host, record, secrets).items():
            call(files.write_file, given / name, content, application.mode_of(name), group=owner)
        if record.spec.is_ephemeral and not secrets.has_terminal:
            uid, gid = secrets.process_ids
            call(streams.make_fifos, given, owner + uid, owner + gid)

    def open_streams(self, host: Host, record: Record) -> Streams:
        return host.shell.call(streams.open_fifos, host.store.application(record.uuid))

    def _write_identity(self, host: Host, record: Record, name: str, content: bytes) -> None:
        """Root's, so that the container cannot change it, and for its root to read."""
        path = host.store.identity(record.uuid) / name
        host.shell.call(files.write_file, path, content, 0o640, group=record.first_id or 0)

    def create_root(self, host: Host, record: Record, image: Image, secrets: Secrets) -> None:
        self.layers.create(host, record, image, record.layers[-1], "")
        self.add_seed(host, record, secrets)

    def add_seed(self, host: Host, record: Record, secrets: Secrets) -> None:
        layer, owner = host.store.layer(record.layers[-1]), record.first_id or 0
        if secrets.user_data or record.provision is Provision.NOCLOUD:
            content = seed.format_files(record, secrets.host_key, secrets.user_data)
            host.shell.call(roots.add_files, layer, owner, "var/lib/cloud/seed/nocloud", content)

    def release_root(self, host: Host, record: Record) -> None:
        host.shell.call(roots.unmount, host.store.instance(record.uuid))

    def discard_files(self, host: Host, record: Record) -> None:
        host.shell.call(roots.unmount, host.store.instance(record.uuid))
        super().discard_files(host, record)

    def hold(self, host: Host, record: Record) -> str:
        self.pause(host, record)
        return ""

    def release(self, host: Host, record: Record) -> None:
        if self._state(host, record) is State.PAUSED:
            self.resume(host, record)

    def copy_top(self, host: Host, record: Record, target: Path) -> None:
        words = ["cp", "--archive", "--reflink=auto", "--", str(host.store.layer(record.layers[-1])), str(target)]
        host.shell.run(words, timeout_s=_COPY_TIMEOUT_S)

    def export_root(self, work: Building, record: Record, image: Image, top: Path, *, keep_identity: bool) -> Image:
        from hvctl.backends import containerimage

        return containerimage.export_root(work, record, image, top, keep_identity=keep_identity)

    def format_values(self, host: Host, record: Record, image: Image) -> Values:
        store, spec, uuid = host.store, record.spec, record.uuid
        layer = store.layer(record.layers[-1])
        has_seed = host.shell.call(files.exists, layer / "upper/var/lib/cloud/seed/nocloud")
        return {
            "name": record.name,
            "uuid": str(uuid),
            "memory_kib": spec.memory_bytes // 1024,
            "cpus": spec.cpus,
            "cpuset": spec.cpuset,
            "cpu_period_us": _PERIOD_US,
            "cpu_quota_us": spec.cpus * _PERIOD_US,
            "init": _INIT,
            # In a container systemd and cloud-init read these where a kernel's command line would be.
            "init_arguments": () if has_seed or record.provision is Provision.NONE else ("cloud-init=disabled",),
            "first_id": record.first_id or 0,
            "id_count": ids.COUNT,
            "emulator": "" if host.shell.call(daemons.has_systemd) else emulator.PROGRAM,
            "programs": tuple(
                (application.find_program(host, name), f"{application.HERE}/{name}") for name in ("busybox", "gosu")
            ),
            "application": str(store.application(uuid)),
            "output": str(store.output(uuid)),
            "root": str(store.container_root(uuid)),
            "identity": str(store.identity(uuid)),
            "proc_files": _proc_files() if host.shell.call(daemons.has_lxcfs) else (),
            "mounts": tuple(
                (str(store.container_mount(uuid, number)), mount.target) for number, mount in enumerate(spec.mounts)
            ),
            "network": record.network,
            "mac": record.mac,
            "device": record.device,
        }

    def finish_xml(self, host: Host, record: Record, image: Image, xml: str) -> str:
        """Refuse what would hand the host over: ids that are not shifted, or a privileged one on the host's network."""
        domain = ElementTree.fromstring(xml)
        name = record.spec.template
        if record.first_id and domain.find("idmap/uid") is None:
            raise InvalidSpec(
                f"template {name!r} leaves <idmap> out: the container's root would be the host's",
                hint="put it in, or say --privileged",
            )
        if record.spec.is_privileged and domain.find("features/privnet") is None:
            raise InvalidSpec(
                f"template {name!r} gives a privileged container the host's network: it would be the host",
                hint="leave --privileged away, or use another template",
            )
        return xml

    def resize_xml(self, domain: ElementTree.Element, spec: Spec) -> None:
        super().resize_xml(domain, spec)
        for path, number in (
            ("memtune/hard_limit", spec.memory_bytes // 1024),
            ("cputune/period", _PERIOD_US),
            ("cputune/quota", spec.cpus * _PERIOD_US),
        ):
            element = domain.find(path)
            if element is not None:
                element.text = str(number)

    def resize_live(self, host: Host, record: Record, field_name: str) -> None:
        domain, spec = self._domain(host, record), record.spec
        if field_name == "cpus":
            domains.set_cpu_quota(domain, period_us=_PERIOD_US, quota_us=spec.cpus * _PERIOD_US)
        else:
            kept_bytes = host.shell.call(held.read_kept, self._controller(host, record))
            if kept_bytes > spec.memory_bytes:
                raise WrongState(f"{record.name!r} uses {format_size(kept_bytes)}", hint=f"hvctl restart {record.name}")
            domains.set_memory_limit(domain, spec.memory_bytes)
        limits = confine.Limits(
            first_id=record.first_id or 0,
            memory_bytes=spec.memory_bytes,
            cpus=spec.cpus,
            processes=spec.processes or confine.DEFAULT_PROCESSES,
        )
        host.shell.call(confine.hold, self._controller(host, record), limits)

    def rename(self, host: Host, record: Record, name: str) -> None:
        """libvirt-LXC cannot: defined anew under its UUID, with the definition in the store while libvirt has none."""
        domain = ElementTree.fromstring(domains.get_xml(self._domain(host, record)))
        element = domain.find("name")
        assert element is not None
        element.text = name
        renamed = replace(record, spec=replace(record.spec, name=name))
        xml = metadata.embed(ElementTree.tostring(domain, encoding="unicode"), renamed)
        host.shell.call(files.write_file, host.store.renaming(record.uuid), xml.encode(), 0o600)
        self.finish_rename(host, renamed)

    def finish_rename(self, host: Host, record: Record) -> None:
        path = host.store.renaming(record.uuid)
        if not host.shell.call(files.exists, path):
            return
        try:
            domain = self._domain(host, record)
        except NotFound:
            domain = None
        if domain is None or domains.get_name(domain) != record.name:
            if domain is not None:
                domains.undefine(domain)
            domains.define(host.connection(self.mode), host.read_text(path))
        host.shell.call(files.remove, path)

    def undo_rename(self, host: Host, record: Record) -> None:
        host.shell.call(files.remove, host.store.renaming(record.uuid))

    def write_name(self, host: Host, record: Record) -> None:
        if record.is_application:
            given, owner = host.store.application(record.uuid), record.first_id or 0
            for name, content in application.format_names(record, record.address).items():
                host.shell.call(files.write_file, given / name, content, application.mode_of(name), group=owner)
            return
        self._write_identity(host, record, "hvctl.name", record.name.encode())

    def run_inside(self, host: Host, record: Record, argv: tuple[str, ...], stdin: bytes) -> ExecResult:
        status, out, err = self._enter(host, record, enter.capture, argv, ENVIRONMENT, stdin)
        return ExecResult(status=status, stdout=out, stderr=err)

    def _ask(self, host: Host, record: Record, *argv: str, **options: int) -> ExecResult:
        status, out, err = self._enter(host, record, enter.ask, argv, ENVIRONMENT, **options)
        return ExecResult(status=status, stdout=out, stderr=err)

    def attach(self, host: Host, record: Record, argv: tuple[str, ...], *, with_terminal: bool | None) -> int:
        is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        use_terminal = is_interactive if with_terminal is None else with_terminal
        environment = {**ENVIRONMENT, "TERM": os.environ.get("TERM", "xterm")} if use_terminal else ENVIRONMENT
        sys.stdout.flush()
        status: int = self._enter(host, record, enter.run, argv, environment, with_terminal=use_terminal)
        return status

    def _enter(self, host: Host, record: Record, function: Any, *arguments: Any, **options: Any) -> Any:
        host.require_root("exec in a container")
        try:
            return host.shell.call(function, self._controller(host, record), *arguments, **options)
        except HostError as error:
            raise HostError(
                f"cannot enter {record.name!r}: {error.message}", hint=f"is it up? hvctl show {record.name}"
            ) from error

    def ask_to_stop(self, host: Host, record: Record) -> None:
        """libvirt speaks to systemd's and SysV's init; busybox's takes its SIGTERM for a wish to reboot. A system's own
        `poweroff` knows whom it speaks to."""
        if record.is_application:
            domains.terminate(self._domain(host, record))
            return
        if record.provision is Provision.NONE:
            with contextlib.suppress(HvctlError):
                if self._ask(host, record, "poweroff").status == 0:
                    return
        super().ask_to_stop(host, record)

    def kill(self, host: Host, record: Record) -> None:
        """libvirt first asks all processes to end and waits 1.6 s; with its init gone there is nobody left to ask."""
        with contextlib.suppress(WrongState):
            host.shell.call(enter.kill_init, self._controller(host, record))
        try:
            super().kill(host, record)
        except LibvirtFailed:
            # Its control groups went while libvirt was reading them (version 2): it is going off by itself then.
            if not domains.goes_off(self._domain(host, record), timeout_s=_END_TIMEOUT_S):
                raise

    def pause(self, host: Host, record: Record) -> None:
        pause(host, record)

    def resume(self, host: Host, record: Record) -> None:
        resume(host, record)

    def answers(self, host: Host, record: Record) -> bool:
        try:
            return self._ask(host, record, "true").status == 0
        except HvctlError:
            return False

    def has_booted(self, host: Host, record: Record, *, log_start: int) -> bool:
        return True  # the host's kernel has

    def is_up(self, host: Host, record: Record, *, log_start: int) -> bool:
        return self.answers(host, record)

    def measure_memory(self, host: Host, record: Record) -> int:
        return domains.get_used_bytes(self._domain(host, record))

    def read_log(self, host: Host, record: Record, *, limit_bytes: int) -> bytes:
        """The journal of this boot while it runs (it is kept in memory); else what went wrong as its controller said it.

        An application's: what its process printed.
        """
        if record.is_application and (printed := processes.read_log(host, record, limit_bytes=limit_bytes)):
            return printed
        if not record.is_application and self._state(host, record) is State.RUNNING:  # a paused one answers nothing
            journal = f"journalctl --boot --no-pager --quiet --output=short-monotonic | tail --bytes={limit_bytes}"
            result = self._ask(host, record, "sh", "-c", journal, limit_bytes=limit_bytes)
            if result.status == 0 and result.stdout:
                return result.stdout
        path = Path("/var/log/libvirt/lxc") / f"{record.name}.log"
        if not host.shell.call(files.exists, path):
            return b""
        return _find_faults(host.shell.call(files.read_tail, path, limit_bytes=limit_bytes), str(record.uuid))

    def _domain(self, host: Host, record: Record) -> Any:
        return domains.get(host.connection(self.mode), record.uuid)

    def _state(self, host: Host, record: Record) -> State:
        return domains.describe(self._domain(host, record)).live.state

    def _controller(self, host: Host, record: Record) -> int:
        """The process of `libvirt_lxc`, which is libvirt's number of the domain. Raises WrongState when it is off."""
        return domains.get_number(self._domain(host, record))


def _find_faults(log: bytes, uuid: str) -> bytes:
    """What a controller's last start has to say for people. libvirt's log goes on from start to start, of whoever has the
    name; each begins with "starting up" and the command lines, with the container's UUID, of the controller and its init."""
    last = log.rpartition(b": starting up\n")[2]
    if uuid.encode() not in last:
        return b""
    noise = (b"PATH=", b": info :", b": warning :", b"error destroying network device")  # which is gone already then
    return b"".join(line for line in last.splitlines(keepends=True) if not any(word in line for word in noise))


def _proc_files() -> tuple[tuple[str, str], ...]:
    """What lxcfs shows in the place of the host's. libvirt's own /proc/meminfo cannot seek before 11, so `free` fails."""
    names = ("cpuinfo", "diskstats", "loadavg", "meminfo", "stat", "swaps", "uptime")
    return tuple((str(daemons.LXCFS / "proc" / name), f"/proc/{name}") for name in names)
