"""What comes of a backup: brought into a directory of the store, checked, nothing of it in use yet."""

from __future__ import annotations

from pathlib import Path

from hvctl import identity
from hvctl.backends import get_backend
from hvctl.backups.manifest import Backup, Part
from hvctl.backups.repository import Repository
from hvctl.errors import InvalidSpec
from hvctl.events import Sink
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.model import DataDisk, Image, Record, VolumeFormat
from hvctl.rootfs import intake, manifest, unpacked
from hvctl.rootfs.building import Building
from hvctl.units import GIB, MIB
from hvctl.values import dataclass

# What may be in a backup's state, and how much of it at most.
_STATE = {
    "hvctl.host_key": 64 * 1024,
    "seed.iso": 64 * MIB,
    "nvram.fd": 64 * MIB,
    "tpm.permall": 16 * MIB,
    "vmlinuz": 256 * MIB,
    "initrd": 1 * GIB,
}
_KEY, SEED = "hvctl.host_key", "seed.iso"
_ANOTHER = "restore another one"


@dataclass(frozen=True, kw_only=True)
class Brought:
    """What came of a backup, checked, in a directory of the store."""

    folder: Path
    """Layers and data volumes, each under its identifier in the record."""
    state: Path
    """A directory with its state."""
    has_image: bool
    """Whether the image came along, and is still to be put into the store."""


@dataclass(frozen=True, kw_only=True)
class Bringing:
    """A backup on its way into a building directory."""

    repository: Repository
    backup: Backup
    work: Building
    events: Sink

    def bring(self, record: Record, image: Image, *, with_image: bool) -> Brought:
        """All that an instance with this record, on this image, is to consist of. Raises InvalidSpec for what is refused."""
        call, folder = self.work.host.shell.call, self.work.directory / "content"
        mode_layers = get_backend(record.mode).layers
        state = self._bring_state()
        if with_image:
            parts = {part.name: self._load(part) for part in self.backup.base_parts}
            mode_layers.write_base(self.work, image, parts)
            content = manifest.format_manifest(image)
            call(files.write_file, self.work.image / "manifest.json", content, 0o444)
            call(files.set_mode, self.work.image, 0o711)
        call(files.make_directory, folder, 0o700)
        for parent, layer, part in zip(("", *record.layers), record.layers, self.backup.layers, strict=False):
            mode_layers.write_layer(self.work.host, image, parent, self._load(part), folder / layer)
        for disk, (_fields, part) in zip(record.disks, self.backup.volumes, strict=False):
            self._bring_volume(disk, part, folder / disk.volume)
        return Brought(folder=folder, state=state, has_image=with_image)

    def _load(self, part: Part) -> Path:
        """One part as a file, its digest checked."""
        target = self.work.directory / f"part-{part.name}"
        self.repository.load(part, target, self.events, self.work.name)
        return target

    def _bring_state(self) -> Path:
        """A directory with files that a state may have, and nothing else."""
        call, folder = self.work.host.shell.call, self.work.directory / "given"
        unpacked.unpack(self.work.host, self._load(self.backup.state), folder, "state")
        state = folder / "state"
        for name in call(files.list_names, state):
            path, most_bytes = state / name, _STATE.get(name, -1)
            if not call(files.is_regular, path) or call(files.size, path) > most_bytes:
                raise InvalidSpec(f"the backup's state holds {name[:80]!r}, which cannot be", hint=_ANOTHER)
            call(files.set_owner, path, 0, 0)
            call(files.set_mode, path, 0o600)
        return state

    def _bring_volume(self, disk: DataDisk, part: Part, aside: Path) -> None:
        """A data volume, as `volumes.make` makes an empty one, but for what describes it."""
        host, call, content = self.work.host, self.work.host.shell.call, self._load(part)
        if disk.format is VolumeFormat.DIRECTORY:
            unpacked.unpack(host, content, aside, "data")
            return
        facts = intake.check_disk(host, content, format=disk.format)
        if facts.virtual_bytes != disk.size_bytes:
            raise InvalidSpec(f"volume {disk.name!r} is not as long as it should be", hint=_ANOTHER)
        call(files.make_directory, aside, 0o711)
        call(files.set_mode, content, 0o600)
        call(files.replace_if_there, content, aside / f"disk.{disk.format}")


def read_key(host: Host, state: Path) -> identity.KeyPair | None:
    """The ssh host key of a state; None where there is none. Raises InvalidSpec."""
    if not host.shell.call(files.exists, state / _KEY):
        return None
    content = host.shell.call(files.read_file, state / _KEY)
    try:
        return identity.KeyPair(private=content, public=identity.public_of(content))
    except InvalidSpec as error:
        raise InvalidSpec("the backup's ssh host key is none", hint=_ANOTHER) from error
