"""Where everything lies on a host: the one place that knows the paths of the store and the run directory.

Path arithmetic, and one look: which half of an image is its own. File names are UUIDs, digests or checked names, never
what somebody typed.

    STORE/                       0711  root      (the qemu user must pass, nobody may list)
      images/ID/                 0711            manifest.json disk.qcow2 vmlinuz initrd, all 0444, tree/ 0700
      images/ID/made/{disk,tree}/  0711, 0700    the half that it did not come with, made when it was first needed
      tags/NAME                                  one line: the identifier of the image
      layers/ID/                 0711            a VM's: disk.qcow2 layer.json
      layers/ID/                 0700            a container's: upper/ work/ layer.json
      instances/UUID/            0711            a VM's: domain.xml identity/ vmlinuz initrd seed.iso console.log nvram.fd
      instances/UUID/            0710            a container's (its own group): domain.xml identity/ and, all mount
                                                 points, root/ mounts/N below/N
      instances/UUID/{application,output}/       an application's: what its init is given, and gives back
      volumes/ID/                0711            volume.json, and disk.raw or disk.qcow2 (0600)
      volumes/ID/                0700            a directory volume: volume.json data/
      instances/UUID/snapshots/ID/  0700         domain.xml and, where there is one, nvram.fd memory.save tpm.permall
                                                 vmlinuz initrd
      renaming/UUID.xml          0711            a definition on its way to another name; empty but for moments
      building/OPERATION/        0700            private directories; published from here by rename
    downloads/DIGEST.part      0600            what has come of an address (0700; the digest is that of the address)
    downloads/DIGEST.json                      which version of it that is, as its server says
    RUN/                         0755
      locks/                     2770  root:libvirt
      accel.json, last-address, namespaces/
"""

from __future__ import annotations

from pathlib import Path

TYPE_CHECKING = False  # not typing's, which costs libvirt's hooks more than all else here
if TYPE_CHECKING:
    from uuid import UUID


class Store:
    """The paths below one store directory and one run directory."""

    def __init__(self, root: Path, run: Path) -> None:
        self.root = root
        self.run = run

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def tags(self) -> Path:
        return self.root / "tags"

    @property
    def layers(self) -> Path:
        return self.root / "layers"

    @property
    def instances(self) -> Path:
        return self.root / "instances"

    @property
    def volumes(self) -> Path:
        return self.root / "volumes"

    @property
    def building(self) -> Path:
        return self.root / "building"

    @property
    def downloads(self) -> Path:
        return self.root / "downloads"

    def renaming(self, uuid: UUID) -> Path:
        """The definition of an instance that libvirt has for neither its old name nor its new one at this moment."""
        return self.root / "renaming" / f"{uuid}.xml"

    @property
    def locks(self) -> Path:
        return self.run / "locks"

    @property
    def accelerator(self) -> Path:
        """The kept verdict on KVM."""
        return self.run / "accel.json"

    @property
    def last_address(self) -> Path:
        """The address that was given last; the next instance gets one after it."""
        return self.run / "last-address"

    def image(self, image_id: str) -> Path:
        return self.images / image_id

    def image_tree(self, image_id: str) -> Path:
        """The root tree that an image came with, or the one that was made of its disk."""
        own = self.images / image_id / "tree" / "rootfs"
        return own if own.exists() else self.made(image_id) / "tree" / "rootfs"

    def made(self, image_id: str) -> Path:
        """Where the half goes that an image did not come with."""
        return self.images / image_id / "made"

    def layer(self, layer_id: str) -> Path:
        return self.layers / layer_id

    def layer_disk(self, layer_id: str) -> Path:
        return self.layers / layer_id / "disk.qcow2"

    def volume(self, volume_id: str) -> Path:
        return self.volumes / volume_id

    def volume_facts(self, volume_id: str) -> Path:
        """What describes a volume that no instance has; there only once the volume is whole."""
        return self.volumes / volume_id / "volume.json"

    def volume_content(self, volume_id: str, format_: str) -> Path:
        """The file that holds a volume, or the directory that is one."""
        return self.volumes / volume_id / ("data" if format_ == "directory" else f"disk.{format_}")

    def layer_upper(self, layer_id: str) -> Path:
        return self.layers / layer_id / "upper"

    def snapshots(self, uuid: UUID) -> Path:
        return self.instance(uuid) / "snapshots"

    def snapshot(self, uuid: UUID, snapshot_id: str) -> Path:
        """What belongs to a snapshot beside its layer."""
        return self.snapshots(uuid) / snapshot_id

    def instance(self, uuid: UUID) -> Path:
        return self.instances / str(uuid)

    def definition(self, uuid: UUID) -> Path:
        return self.instance(uuid) / "domain.xml"

    def kernel(self, uuid: UUID) -> Path:
        """An instance's own copy: libvirt gives the file that it boots to the qemu user, so none may be shared."""
        return self.instance(uuid) / "vmlinuz"

    def initrd(self, uuid: UUID) -> Path:
        return self.instance(uuid) / "initrd"

    def identity(self, uuid: UUID) -> Path:
        return self.instance(uuid) / "identity"

    def application(self, uuid: UUID) -> Path:
        """What the init of an application is given: how to start its process, with what and for whom."""
        return self.instance(uuid) / "application"

    def output(self, uuid: UUID) -> Path:
        """What the init of an application gives back: the status of its process, and what that printed."""
        return self.instance(uuid) / "output"

    def seed(self, uuid: UUID) -> Path:
        return self.instance(uuid) / "seed.iso"

    def nvram(self, uuid: UUID) -> Path:
        return self.instance(uuid) / "nvram.fd"

    def container_root(self, uuid: UUID) -> Path:
        """Where a container's root is mounted while it runs."""
        return self.instance(uuid) / "root"

    def container_mount(self, uuid: UUID, name: int | str) -> Path:
        """Where a shared directory (by its number) or a volume (by its identifier) is mounted while it runs."""
        return self.instance(uuid) / "mounts" / str(name)

    def console_log(self, uuid: UUID) -> Path:
        return self.instance(uuid) / "console.log"
