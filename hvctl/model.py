"""The words of hvctl as plain frozen values: mode, state, spec, record, instance, image.

Nothing here reads or changes anything; every other module speaks in these.
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from uuid import UUID

from hvctl.values import dataclass


class Mode(StrEnum):
    """How an instance is isolated: by a hypervisor, or by the kernel's namespaces."""

    VM = "vm"
    CONTAINER = "container"


class State(StrEnum):
    """What an instance is doing, in hvctl's words."""

    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    STOPPED = "stopped"
    CRASHED = "crashed"
    SUSPENDED = "suspended"
    INCOMPLETE = "incomplete"


class Accelerator(StrEnum):
    """What runs a guest's instructions."""

    KVM = "kvm"
    TCG = "tcg"


class AccelChoice(StrEnum):
    """What the user asked for; `auto` takes the probe's verdict."""

    AUTO = "auto"
    KVM = "kvm"
    TCG = "tcg"


@dataclass(frozen=True, kw_only=True)
class AccelVerdict:
    """What a trial of KVM found on a host, and the accelerator that follows from it."""

    accelerator: Accelerator
    is_kvm_present: bool
    """Whether `/dev/kvm` opened, so that KVM could be tried at all."""
    finding: str
    """`64-bit guest code ran at 1.1 ns a step`, `kvm is there but unusable: ...` or `no kvm: ...`."""
    ns_per_step: float | None = None
    """Measured time of one step of 64-bit guest code; none when not enough of it ran."""
    is_lasting: bool = True
    """Whether it holds for every user of the host, or only for the one who asked."""

    @property
    def line(self) -> str:
        """The accelerator and why, for people: `tcg (software emulation): no kvm: ...`."""
        label = {Accelerator.KVM: "kvm", Accelerator.TCG: "tcg (software emulation)"}[self.accelerator]
        return f"{label}: {self.finding}"


class Wait(StrEnum):
    """How far a guest must have come before `create` and `start` return."""

    SSH = "ssh"
    AGENT = "agent"
    RUNNING = "running"
    NONE = "none"


class Provision(StrEnum):
    """How an image learns its name and keys at boot.

    `credentials`: fw_cfg files that systemd imports (images hvctl builds, no disk, no cloud-init).
    `nocloud`: a cloud-init seed disk.
    `none`: it knows no such thing; commands are run in it without the network.
    `process`: it has no system that could; hvctl's own init starts its one process.
    """

    CREDENTIALS = "credentials"
    NOCLOUD = "nocloud"
    NONE = "none"
    PROCESS = "process"


class Firmware(StrEnum):
    """What starts the boot loader of a disk that brings its own."""

    BIOS = "bios"
    UEFI = "uefi"


@dataclass(frozen=True, kw_only=True)
class Mount:
    """A directory of the host that a container sees, too."""

    source: str
    target: str
    is_read_only: bool = False
    uid: int = 0
    gid: int = 0
    """Whose the files of the container's root are out there: the caller's."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What was asked for when an instance was made. Holds no secret: any libvirt user can read it."""

    name: str
    mode: Mode
    image: str
    cpus: int = 2
    memory_bytes: int = 1024**3
    disk_bytes: int = 0
    """Virtual size of the root disk; 0 takes the image's."""
    template: str = ""
    """Empty: the one that its image needs."""
    variables: tuple[tuple[str, str], ...] = ()
    accel: AccelChoice = AccelChoice.AUTO
    autostart: bool = False
    cpuset: str = ""
    """The host's CPUs it may run on (`0-3,8`); empty: all."""
    processes: int = 0
    """How many processes and threads it may have; 0 takes the mode's."""
    is_privileged: bool = False
    """A container whose root is the host's root: asked for by name, never the default."""
    mounts: tuple[Mount, ...] = ()
    is_ephemeral: bool = False
    """Made by `run`: its streams are that process's, and it is deleted when that process has ended, by `gc` at the latest."""


class DiskKind(StrEnum):
    """Where the content of a disk comes from, and so whether it is ours to delete."""

    ROOT = "root"
    """The instance's layers; no record lists it among the data disks."""
    VOLUME = "volume"
    """Made by hvctl, in the store."""
    DEVICE = "device"
    """A block device of the host: never ours."""
    ISO = "iso"
    """A read-only image file of the host's: never ours."""


class VolumeFormat(StrEnum):
    """What a volume is on the host's disk. Recorded when it is made, never probed."""

    RAW = "raw"
    QCOW2 = "qcow2"
    DIRECTORY = "directory"


class Cache(StrEnum):
    """How a disk uses the host's page cache (qemu(1), -drive cache=); `default` leaves it to QEMU."""

    DEFAULT = "default"
    NONE = "none"
    WRITEBACK = "writeback"
    WRITETHROUGH = "writethrough"
    UNSAFE = "unsafe"


EXT4 = "ext4"
"""The one file system that hvctl makes on a volume."""


@dataclass(frozen=True, kw_only=True)
class Throttle:
    """The most that a disk may do in a second, reads and writes together; 0: no limit."""

    iops: int = 0
    bytes_per_s: int = 0


@dataclass(frozen=True, kw_only=True)
class DataDisk:
    """A disk of an instance beside its root. What `volume` names belongs to the instance; `source` never does."""

    name: str
    kind: DiskKind
    format: VolumeFormat
    volume: str = ""
    """Identifier (a UUID) of the volume in the store; empty for what is not ours."""
    source: str = ""
    """Path of what is not ours on the host; empty for a volume."""
    size_bytes: int = 0
    """What the instance sees; 0: as large as the file system it lies on (a directory), or unknown (a device)."""
    filesystem: str = ""
    """What hvctl has made on it: `ext4`, or nothing."""
    is_guest_written: bool = False
    """Whether a guest's kernel may have written that file system, so that the host's must not trust it."""
    target: str = ""
    """A VM's: `vdb`. A container's: the directory at which it is seen."""
    serial: str = ""
    """What the guest finds it by: /dev/disk/by-id/virtio-SERIAL."""
    is_read_only: bool = False
    cache: Cache = Cache.DEFAULT
    has_discard: bool = True
    """Whether blocks that the guest discards are given back to the host."""
    throttle: Throttle = Throttle()


class Consistency(StrEnum):
    """What a snapshot's files look like to the system that wrote them."""

    STOPPED = "stopped"
    """It was off: as it left them."""
    FROZEN = "frozen"
    """It ran, and held still with everything written."""
    MEMORY = "memory"
    """It ran, and its memory was kept with them."""
    CRASH = "crash-consistent"
    """It ran and could not be asked: as after a power cut."""


class Purpose(StrEnum):
    """Why there is a snapshot, and so who may take it away."""

    USER = "user"
    """Somebody named it: only somebody deletes it."""
    SCHEDULE = "schedule"
    """Its schedule took it, and lets it expire."""
    COPY = "copy"
    """For the moments of a copy; listed nowhere, collected by `gc` when the copy died."""
    BACKUP = "backup"
    """For as long as a backup reads it: as a copy's, and layers below it are not merged meanwhile."""

    @property
    def is_passing(self) -> bool:
        """Whether it lasts only as long as what it was taken for."""
        return self in (Purpose.COPY, Purpose.BACKUP)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A named layer of an instance. Its definition, NVRAM and memory lie in the store, in a directory named `id`."""

    id: str
    name: str
    layer: str
    """The layer it ends with, never written again; those below are the layer's own to tell. Empty: the image itself."""
    mode: Mode
    """What the instance was: only as that can it be reverted to this snapshot."""
    parent: str = ""
    """Identifier of the snapshot that the instance came from when it was taken; empty: from its creation."""
    taken_at: str = ""
    """UTC, ISO 8601 to the second."""
    comment: str = ""
    consistency: Consistency = Consistency.STOPPED
    purpose: Purpose = Purpose.USER


@dataclass(frozen=True, kw_only=True)
class PendingOperation:
    """The intent of a change that has begun: which verb, and the step that was about to be done.

    Present in a record only between the first effect of a change and its end.
    """

    verb: str
    step: str
    arguments: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything hvctl knows of an instance beyond the domain XML; kept in the domain's metadata.

    What is named here (layers, reservation, directory by UUID) is what the instance owns; `delete` removes just that.
    """

    uuid: UUID
    spec: Spec
    store: Path
    image_id: str
    layers: tuple[str, ...]
    """Identifiers of the layers in the store, lowest first; the last one is writable."""
    network: str
    mac: str
    address: str = ""
    login_user: str = "root"
    host_key: str = ""
    """The public ssh host key that was made for it: `ssh-ed25519 AAAA...`."""
    authorized_keys: tuple[str, ...] = ()
    accelerator: Accelerator | None = None
    provision: Provision = Provision.CREDENTIALS
    kernel_release: str = ""
    """The kernel it boots directly (`uname -r`), from its image or fetched from the guest; empty: its own boot loader."""
    first_id: int | None = None
    """A container's: the uid and gid outside of what is root inside; 65,536 from there on are its own. 0: privileged."""
    created_at: str = ""
    """UTC, ISO 8601 to the second."""
    labels: tuple[tuple[str, str], ...] = ()
    disks: tuple[DataDisk, ...] = ()
    """Its data disks, oldest first."""
    snapshots: tuple[Snapshot, ...] = ()
    """Oldest first."""
    current: str = ""
    """Identifier of the snapshot that it has come from: the last one taken or reverted to."""
    keep: tuple[tuple[str, int], ...] = ()
    """Its schedule: (`hourly`, 24) keeps the last snapshot of each of the last 24 hours that have one."""
    pending: PendingOperation | None = None
    unknown: tuple[str, ...] = ()
    """Elements of newer minor versions or other tools inside our metadata, kept as they were."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def mode(self) -> Mode:
        return self.spec.mode

    @property
    def is_application(self) -> bool:
        """Whether it is one process of an application image rather than a system with an init, sshd and accounts."""
        return self.provision is Provision.PROCESS

    @property
    def device(self) -> str:
        """The host's end of its network interface: at most 15 characters (IFNAMSIZ), never libvirt's own `vnet*`."""
        return f"hv{self.uuid.hex[:10]}"


@dataclass(frozen=True, kw_only=True)
class Live:
    """What libvirt says of a domain right now."""

    state: State
    cause: str = ""
    """Why it is in this state where that helps: `disk full`, `crashed`, `shut down by the guest`."""
    cpus: int
    memory_bytes: int
    is_autostart: bool
    is_persistent: bool = True


@dataclass(frozen=True, kw_only=True)
class Instance:
    """An instance as `list` and `show` give it: the record and the live truth."""

    record: Record
    live: Live

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def state(self) -> State:
        """The live state, or `incomplete` while a change that has begun is not finished."""
        return State.INCOMPLETE if self.record.pending else self.live.state


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A way in: where ssh reaches an instance, and the only host key that is accepted there."""

    instance: str
    address: str
    port: int = 22
    user: str = "root"
    host_key: str = ""


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """One file of an image: its name in the image's directory, size in bytes and SHA-256 in hex."""

    file: str
    size_bytes: int
    sha256: str

    @property
    def bare(self) -> Artefact:
        """The same by its name alone, whichever of the image's directories it lies in."""
        return replace(self, file=Path(self.file).name)


@dataclass(frozen=True, kw_only=True)
class Disk:
    """A root disk: the file, its format (recorded, never probed) and the size the guest sees."""

    artefact: Artefact
    format: str
    virtual_bytes: int


@dataclass(frozen=True, kw_only=True)
class Process:
    """What an application image runs, as its configuration says (OCI image-spec, config.md).

    `entrypoint` and `command` are argument lists; a user's own words replace the command alone.
    """

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    user: str = ""
    """`user`, `uid`, `user:group` or `uid:gid`, as it was written; empty: root."""
    directory: str = "/"
    ports: tuple[str, ...] = ()
    """`80/tcp`: where it says that it listens."""
    stop_signal: str = "SIGTERM"


@dataclass(frozen=True, kw_only=True)
class Image:
    """A published image: its manifest as a value. The identifier is the SHA-256 of the manifest's content.

    Disk and tree are the two halves. One that the image did not come with is made from the other when it is first
    needed (`rootfs/halves.py`), and is then here like one that it came with.
    """

    id: str
    name: str
    os: str
    version: str
    architecture: str
    created_at: str
    login_user: str
    provision: Provision
    disk: Disk | None
    kernel: Artefact | None
    initrd: Artefact | None
    kernel_arguments: tuple[str, ...] = ()
    kernel_release: str = ""
    has_tree: bool = False
    """Whether `tree/rootfs` is there, for containers."""
    packages: tuple[str, ...] = ()
    """Extra packages that were asked for when it was built."""
    firmware: Firmware = Firmware.BIOS
    """What its disk needs when no kernel is handed over."""
    tree_digest: str = ""
    """What the tree was made from, `sha256:...`, where it is the half that the image came with and there is no disk."""
    process: Process | None = None
    """Of an application image; None: a whole system with an init of its own."""
    source: str = ""
    """Where it came from, for people: `docker://debian:12`, an address, a file; empty: built here."""
    origin: str = ""
    """The digest of what was brought here for it, `sha256:...`; the same again need not be brought."""

    @property
    def artefacts(self) -> tuple[Artefact, ...]:
        """Its kernel, initrd and disk, as far as it has them."""
        parts = (self.kernel, self.initrd, self.disk.artefact if self.disk else None)
        return tuple(part for part in parts if part is not None)

    @property
    def bare(self) -> Image:
        """The same with each file by its name alone."""
        kernel, initrd = (part.bare if part else None for part in (self.kernel, self.initrd))
        disk = replace(self.disk, artefact=self.disk.artefact.bare) if self.disk else None
        return replace(self, disk=disk, kernel=kernel, initrd=initrd)
