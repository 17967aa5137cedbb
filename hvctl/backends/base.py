"""The interface of a mode: making and removing a root, the values of its template, running a command inside.

Everything else (define, start, metadata, console, ...) libvirt makes alike; it is in `libvirtapi` once.

What not every mode can do is an `optional` method: its one body here raises Unsupported, a backend that can overrides
it, and `hvctl host features` prints the table from which do.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from xml.etree import ElementTree

from hvctl.access.agent import ExecResult
from hvctl.backends.disks import Disks
from hvctl.backends.layers import Layers
from hvctl.errors import HostError, InvalidSpec, Unsupported
from hvctl.events import Sink
from hvctl.host import Host
from hvctl.hostside import files, machine
from hvctl.hostside.streams import Streams
from hvctl.libvirtapi import domains
from hvctl.model import Image, Mode, Process, Record, Spec
from hvctl.units import format_size
from hvctl.values import dataclass

if TYPE_CHECKING:
    from hvctl.backends.conversion import Conversion
    from hvctl.rootfs.building import Building

Values = Mapping[str, object]
F = TypeVar("F", bound=Callable[..., Any])

ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "USER": "root",
    "LOGNAME": "root",
    "LANG": "C.UTF-8",
}
"""What a command that is run inside starts with, whatever the caller's is."""


@dataclass(frozen=True, kw_only=True)
class Secrets:
    """What an instance gets that must never stand in its record, on a command line or in a log."""

    host_key: bytes = field(repr=False)
    """Private ssh host key, OpenSSH format."""
    user_data: bytes = field(default=b"", repr=False)
    """cloud-init user data; empty for none."""
    process: Process | None = field(default=None, repr=False)
    """What an application runs, as its user wants it: words and environment may be secret."""
    process_ids: tuple[int, int] = (0, 0)
    """Its uid and gid, inside."""
    has_terminal: bool = False
    """Whether it is started from outside, in a terminal."""
    is_copy: bool = False
    """Whether its root is another instance's, whose machine id it must not keep."""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """Something that not every mode can: what it is called, and the modes that can."""

    name: str
    modes: tuple[Mode, ...]


def optional(name: str) -> Callable[[F], F]:
    """Mark a method of Backend as an ability that a mode may lack."""

    def mark(method: F) -> F:
        method.__dict__["feature"] = name
        return method

    return mark


class Backend(ABC):
    """One mode. Holds no state; every effect may be done twice."""

    mode: ClassVar[Mode]
    noun: ClassVar[str]
    """`a VM`, `a container`: for messages."""
    least_memory_bytes: ClassVar[int]
    example: ClassVar[Mapping[str, Any]]
    """What a record has in this mode only, with values that are the same on every machine."""
    disks: ClassVar[Disks]
    """What it does with data disks, and with the size of its root."""
    layers: ClassVar[Layers]
    """What it does with the layers of a root."""

    @property
    @abstractmethod
    def conversion(self) -> Conversion:
        """What it does with an instance that comes from the other mode, or goes to it; imported when it is asked for."""

    @abstractmethod
    def plan(self, host: Host, record: Record, image: Image, *, require_kvm: bool) -> tuple[Record, str]:
        """The record with what only this mode has in it, and a line for the user on what was chosen (or empty)."""

    @abstractmethod
    def format_stub(self, record: Record) -> str:
        """The smallest domain XML that claims the name: nothing in it can run or be mistaken for the instance."""

    def check(self, host: Host, record: Record, image: Image) -> None:
        """Raise InvalidSpec, Unsupported or HostError when this cannot become an instance; changes nothing."""
        spec = record.spec
        self.check_image(image)
        self.check_size(spec)
        if spec.disk_bytes:
            self.check_disk(host, spec, image)
        if spec.is_privileged:
            self.check_privileged()
        if spec.processes:
            self.check_processes(spec, image)
        if spec.mounts:
            self.check_mounts(host, spec, image)

    @abstractmethod
    def complete_image(self, host: Host, image: Image, events: Sink, *, is_trusted: bool = False) -> Image:
        """The image with the half that this mode starts from, made now where the image did not come with it.

        `is_trusted`: whether this host's kernel may read the image's file systems.
        """

    def choose_template(self, image: Image) -> str:
        """The template for an instance of this image when the user names none."""
        return "application" if image.process is not None else "default"

    @abstractmethod
    def check_image(self, image: Image) -> None:
        """Raise InvalidSpec when the image has nothing that this mode can start."""

    def check_size(self, spec: Spec) -> None:
        """Raise InvalidSpec or HostError for CPUs or memory that this host or mode cannot give."""
        if spec.memory_bytes < self.least_memory_bytes:
            raise InvalidSpec(
                f"{format_size(spec.memory_bytes)} of memory is too little for {self.noun}",
                hint=f"--memory {format_size(self.least_memory_bytes)} or more",
            )
        _check_fits(spec.memory_bytes, spec.cpus)
        if spec.cpuset:
            _check_cpuset(spec.cpuset)

    @optional("exec in an application (exec)")
    def check_application_exec(self) -> None:
        """Return when commands can be run inside one of an application image."""
        raise self._unsupported(
            "of an application image has no guest agent that could run a command", "run it as a container for that"
        )

    @abstractmethod
    def open_streams(self, host: Host, record: Record) -> Streams:
        """The host's ends of an ephemeral application's stdin, stdout and stderr, once it was started."""

    @abstractmethod
    def check_disk(self, host: Host, spec: Spec, image: Image) -> None:
        """Raise InvalidSpec for a size of the root that cannot be, Unsupported where this host can give it none."""

    @optional("privileged mode (create --privileged)")
    def check_privileged(self) -> None:
        """Return when its root may be the host's root."""
        raise self._unsupported("is never privileged", "leave --privileged away")

    @optional("limit on the number of processes (create --processes)")
    def check_processes(self, spec: Spec, image: Image) -> None:
        """Raise InvalidSpec for a limit on the number of its processes that is too low."""
        raise self._unsupported("runs processes that this host cannot count", "leave --processes away")

    @optional("directories shared with the host (create --mount)")
    def check_mounts(self, host: Host, spec: Spec, image: Image) -> None:
        """Raise InvalidSpec for a shared directory that cannot be."""
        raise self._unsupported("cannot share directories with the host yet", "leave --mount away")

    @optional("choice of accelerator (create --accel, --require-kvm)")
    def check_accelerator(self) -> None:
        """Return when an accelerator can be chosen."""
        raise self._unsupported("runs on the host's CPUs directly", "leave --accel and --require-kvm away")

    @optional("block devices, ISO images, qcow2, cache modes, serial numbers (disk add)")
    def check_block_disks(self) -> None:
        """Return when it has disks, and not only directories."""
        raise self._unsupported(
            "has no disks, only directories: its root may not open the host's devices",
            "mount it on the host and share that (create --mount), or add a volume of a --size",
        )

    @optional("limits on the I/O of a disk (disk add, disk set --iops --rate)")
    def check_throttle(self) -> None:
        """Return when what a disk does in a second can be limited."""
        raise self._unsupported("has the host's file system for a disk, which libvirt cannot limit", "leave it away")

    @optional("volumes that are directories, seen at a path inside (disk add --target)")
    def check_directory_volumes(self) -> None:
        """Return when a volume can be a directory, and is mounted for it."""
        raise self._unsupported(
            "mounts its disks itself", "leave --target away, give a --size, mount /dev/disk/by-id/virtio-NAME inside"
        )

    @optional("kernel of its own (kernel)")
    def check_kernel(self) -> None:
        """Return when it can boot another kernel."""
        raise self._unsupported("shares the host's kernel", "update the host's: it is every container's")

    @optional("taking the console over from another session (console --force)")
    def check_takeover(self) -> None:
        """Return when whoever has its console can be sent away."""
        raise self._unsupported("has a console that libvirt takes from nobody", "leave --force away, or use exec")

    @optional("snapshots with memory (snapshot take --memory)")
    def check_memory(self) -> None:
        """Return when its memory can be kept with a snapshot."""
        raise self._unsupported("cannot keep its memory", "leave --memory away")

    @abstractmethod
    def list_differences(
        self, host: Host, record: Record, image: Image, tops: tuple[str, str], events: Sink
    ) -> list[tuple[str, str]]:
        """What changed from one layer's stack to another's: (`added`, `changed` or `removed`, path), by path.

        Nobody writes to either meanwhile. Raises Unsupported where the files cannot be read.
        """

    @optional("commands with a terminal (exec --tty, run --tty)")
    def check_terminal(self) -> None:
        """Return when `attach` can give a command a terminal."""
        raise self._unsupported(
            "has no terminal for a command: its guest agent cannot give one", "use ssh; exec takes a command, or stdin"
        )

    @contextlib.contextmanager
    def allocate(self, host: Host, record: Record) -> Iterator[Record]:
        """The record with what is this host's to give, held against others until the block has written it to libvirt."""
        yield record

    @abstractmethod
    def create_files(self, host: Host, record: Record, image: Image, secrets: Secrets) -> None:
        """Write what belongs to it beside the root, in its directory of the store: identity, seed, kernel."""

    @abstractmethod
    def dress(self, host: Host, record: Record, secrets: Secrets) -> None:
        """Give its directory of the store owner and modes, and put name and keys into it; part of `create_files`."""

    @abstractmethod
    def add_seed(self, host: Host, record: Record, secrets: Secrets) -> None:
        """Give it cloud-init's seed where it needs one: its user data, or an image that learns everything so."""

    def discard_files(self, host: Host, record: Record) -> None:
        """Remove its directory of the store."""
        host.shell.call(files.remove, host.store.instance(record.uuid))

    @abstractmethod
    def create_root(self, host: Host, record: Record, image: Image, secrets: Secrets) -> None:
        """Make the writable layer on the image."""

    def release_root(self, host: Host, record: Record) -> None:
        """Let go of its layers before they are removed."""
        return

    @abstractmethod
    def hold(self, host: Host, record: Record) -> str:
        """Let the running instance write what it has to, and stop; a line for the user where that is not certain."""

    @abstractmethod
    def release(self, host: Host, record: Record) -> None:
        """Let it go on after `hold`; fine when it does, or is off."""

    @abstractmethod
    def copy_top(self, host: Host, record: Record, target: Path) -> None:
        """Copy its writable layer while it is held."""

    @abstractmethod
    def export_root(self, work: Building, record: Record, image: Image, top: Path, *, keep_identity: bool) -> Image:
        """Make the half of a new image that this mode has, from its layers, with `top` in the place of the writable one.

        `image` is what it was made from; what differs is changed.
        """

    @abstractmethod
    def format_values(self, host: Host, record: Record, image: Image) -> Values:
        """What its templates may use, by name."""

    @abstractmethod
    def finish_xml(self, host: Host, record: Record, image: Image, xml: str) -> str:
        """Add to a rendered definition what no template can be trusted to hold."""

    def resize_xml(self, domain: ElementTree.Element, spec: Spec) -> None:
        """Give a definition other sizes; everything else in it, also what somebody changed by virsh, stays."""
        for tag, number in (("vcpu", spec.cpus), ("memory", spec.memory_bytes // 1024)):
            element = domain.find(tag)
            if element is not None:
                element.text = str(number)
                element.attrib.pop("current", None)
        memory, current = domain.find("memory"), domain.find("currentMemory")
        if memory is not None:
            memory.set("unit", "KiB")
        if current is not None:
            domain.remove(current)

    @abstractmethod
    def resize_live(self, host: Host, record: Record, field_name: str) -> None:
        """Give the running instance the `cpus` or `memory` of its spec. Raises HvctlError when it cannot follow."""

    @abstractmethod
    def rename(self, host: Host, record: Record, name: str) -> None:
        """Give the stopped domain another name, its record and everything else kept; never a moment without either."""

    @abstractmethod
    def finish_rename(self, host: Host, record: Record) -> None:
        """Finish what `rename` was killed in, given the record with the new name; fine when it is finished."""

    @abstractmethod
    def undo_rename(self, host: Host, record: Record) -> None:
        """Take back what `rename` has prepared, given the record with the old name."""

    @abstractmethod
    def write_name(self, host: Host, record: Record) -> None:
        """Tell the instance its name as of the next start."""

    @abstractmethod
    def run_inside(self, host: Host, record: Record, argv: tuple[str, ...], stdin: bytes) -> ExecResult:
        """Run a command as root inside, without the network; output complete, the command's own exit status."""

    @abstractmethod
    def attach(self, host: Host, record: Record, argv: tuple[str, ...], *, with_terminal: bool | None) -> int:
        """Run a command as root inside with this process's stdin, stdout and stderr; its exit status.

        `with_terminal` None: with one when stdin and stdout are terminals and the mode can.
        """

    def pause(self, host: Host, record: Record) -> None:
        """Stop all that runs inside, where it is; it stays in memory."""
        domains.pause(domains.get(host.connection(self.mode), record.uuid))

    def resume(self, host: Host, record: Record) -> None:
        """Let a paused one go on."""
        domains.resume(domains.get(host.connection(self.mode), record.uuid))

    def ask_to_stop(self, host: Host, record: Record) -> None:
        """Ask it to power off; does not wait."""
        domains.ask_to_stop(domains.get(host.connection(self.mode), record.uuid))

    def kill(self, host: Host, record: Record) -> None:
        """End it at once, whatever it is doing; fine when it is off already. Raises NotFound."""
        domains.kill(domains.get(host.connection(self.mode), record.uuid))

    @abstractmethod
    def has_booted(self, host: Host, record: Record, *, log_start: int) -> bool:
        """Whether its system has begun; `log_start`: what `measure_log` gave before this start."""

    def measure_log(self, host: Host, record: Record) -> int:
        """Bytes that the boot log holds; 0 where it begins anew at each boot."""
        return 0

    @abstractmethod
    def answers(self, host: Host, record: Record) -> bool:
        """Whether a command could be run inside now."""

    @abstractmethod
    def is_up(self, host: Host, record: Record, *, log_start: int) -> bool:
        """Whether it has come as far as can be seen of a system that knows nothing of us."""

    @abstractmethod
    def measure_memory(self, host: Host, record: Record) -> int:
        """Bytes of the host's memory that it holds now; 0 when it is off."""

    @abstractmethod
    def read_log(self, host: Host, record: Record, *, limit_bytes: int) -> bytes:
        """The end of what it said when it booted; empty where there is none. Raises HostError when it may not be read."""

    def _unsupported(self, reason: str, hint: str) -> Unsupported:
        return Unsupported(f"{self.noun} {reason}", hint=f"{hint}; what each mode can: hvctl host features")


def list_features(backends: tuple[Backend, ...]) -> tuple[Feature, ...]:
    """What not every mode can, from which methods the backends override."""
    found = []
    for name, method in vars(Backend).items():
        feature = getattr(method, "feature", "")
        if feature:
            can = tuple(backend.mode for backend in backends if getattr(type(backend), name) is not method)
            found.append(Feature(name=feature, modes=can))
    return tuple(found)


def credentials(record: Record, secrets: Secrets) -> dict[str, bytes]:
    """Name and keys as images of hvctl's look for them at every boot (`rootfs/guestfiles.py`): file -> content."""
    return {
        "hvctl.name": record.name.encode(),
        "hvctl.host_key": secrets.host_key,
        "hvctl.authorized_keys": "".join(f"{key}\n" for key in record.authorized_keys).encode(),
    }


def _check_fits(memory_bytes: int, cpus: int) -> None:
    total_bytes = machine.total_memory_bytes()
    if memory_bytes > total_bytes:
        raise HostError(
            f"{format_size(memory_bytes)} of memory is more than this host has ({format_size(total_bytes)})",
            hint="ask for less with --memory",
        )
    count = machine.count_cpus()
    if not 1 <= cpus <= 4 * count:
        raise InvalidSpec(
            f"{cpus} CPUs is not possible on this host with {count} of its own", hint=f"--cpus 1 to {4 * count}"
        )


def _check_cpuset(text: str) -> None:
    count = machine.count_cpus()
    try:
        chosen = machine.parse_cpuset(text)
    except ValueError as error:
        raise InvalidSpec(f"{text!r} is no set of CPUs", hint="--cpuset 0-3,8") from error
    if max(chosen) >= count:
        raise InvalidSpec(f"this host has no CPU {max(chosen)}", hint=f"--cpuset 0-{count - 1}")
