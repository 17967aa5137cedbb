"""The half that an image did not come with: made once, whatever happens meanwhile, and the same as the other.

In a store of its own, without libvirt: instances of such images are started in test_publish.py.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hvctl import gc
from hvctl.config import Config
from hvctl.errors import AlreadyExists, HostError, HvctlError, InvalidSpec, NotFound, Unsupported
from hvctl.events import Event, Note, Progress
from hvctl.host import Host
from hvctl.hostside import identityfiles
from hvctl.model import Disk, Image, Provision
from hvctl.rootfs import archives, building, bundles, halves, published, sources
from hvctl.rootfs.building import Building
from hvctl.rootfs.rawdisk import RawDisk
from hvctl.rootfs.sources import Wanted
from tests import layereddisk, trees, victims
from tests.test_ext4 import MIB, make

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="images are root's")

RELEASE = "6.0.0-1-test"
Deed = Callable[[Host, Callable[[Event], None]], object]


def prepare(top: Path) -> Config:
    """An empty store."""
    for name in ("store", "run", *(f"store/{part}" for part in ("images", "tags", "building", "instances", "layers"))):
        (top / name).mkdir()
    (top / "run/locks").mkdir()
    return Config(store=top / "store", run=top / "run", image="donor")


def add(host: Host, name: str, fill: Callable[[Building], Image]) -> Image:
    with building.begin(host, name, lambda _event: None) as work:
        return work.publish(fill(work))


def plain(name: str) -> Image:
    return Image(
        id="",
        name=name,
        os="debian",
        version="12",
        architecture="x86_64",
        created_at="2026-01-01T00:00:00Z",
        login_user="root",
        provision=Provision.CREDENTIALS,
        disk=None,
        kernel=None,
        initrd=None,
    )


def add_tree(host: Host, name: str, tree: Path) -> Image:
    def fill(work: Building) -> Image:
        work.rootfs.parent.mkdir(mode=0o700)
        subprocess.run(["cp", "-a", str(tree), str(work.rootfs)], check=True, timeout=60)
        return replace(plain(name), has_tree=True, tree_digest=f"sha256:{archives.hash_tree(host, work.rootfs)}")

    return add(host, name, fill)


def add_disk(host: Host, name: str, raw: Path) -> Image:
    def fill(work: Building) -> Image:
        target = work.image / "disk.qcow2"
        words = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(target)]
        subprocess.run(words, check=True, timeout=60)
        artefact = work.artefact(target)
        return replace(plain(name), disk=Disk(artefact=artefact, format="qcow2", virtual_bytes=raw.stat().st_size))

    return add(host, name, fill)


def add_donor(host: Host, tree: Path) -> Image:
    """What stands for an image that hvctl built: a kernel and its modules."""

    def fill(work: Building) -> Image:
        work.rootfs.parent.mkdir(mode=0o700)
        modules = work.rootfs / "usr/lib/modules" / RELEASE
        (modules / "kernel/drivers").mkdir(parents=True)
        (modules / "kernel/drivers/one.ko").write_bytes(b"module" * 1000)
        (modules / "modules.dep").write_text("kernel/drivers/one.ko:\n")
        for file in ("vmlinuz", "initrd"):
            (work.image / file).write_text(f"{file} of the donor")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(work.image / "disk.qcow2"), "1M"], check=True)
        return replace(
            plain("donor"),
            disk=Disk(artefact=work.artefact(work.image / "disk.qcow2"), format="qcow2", virtual_bytes=MIB),
            kernel=work.artefact(work.image / "vmlinuz"),
            initrd=work.artefact(work.image / "initrd"),
            kernel_release=RELEASE,
            kernel_arguments=("root=/dev/vda",),
            has_tree=True,
        )

    return add(host, "donor", fill)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small system as a container has one: an init, no kernel."""
    top = tmp_path_factory.mktemp("system")
    top.chmod(0o755)
    for folder in (
        "etc/ssh",
        "usr/lib/systemd",
        "usr/sbin",
        "home/user",
        "var/lib/cloud/instances/x",
        "var/log/journal/y",
    ):
        (top / folder).mkdir(parents=True)
    (top / "lib").symlink_to("usr/lib")
    (top / "sbin").symlink_to("usr/sbin")
    (top / "usr/lib/systemd/systemd").write_bytes(os.urandom(200_000))
    (top / "usr/sbin/init").symlink_to("/lib/systemd/systemd")
    (top / "etc/os-release").write_text("ID=debian\n")
    (top / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    (top / "etc/hostname").write_text("somebody\n")
    for file in ("etc/ssh/ssh_host_rsa_key", "var/lib/cloud/instances/x/sem", "var/log/journal/y/system.journal"):
        (top / file).write_text("secret")
    (top / "home/user/file").write_text("theirs")
    (top / "home/user/again").hardlink_to(top / "home/user/file")
    os.chown(top / "home/user/file", 1000, 100_000)
    os.setxattr(top / "home/user/file", "user.note", b"kept")
    for path in [top, *top.rglob("*")]:
        os.utime(path, (1_600_000_000, 1_600_000_000), follow_symlinks=False)
    return top


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(prepare(tmp_path))


def ensure_disk(host: Host, events: Callable[[Event], None]) -> object:
    return halves.ensure_disk(host, published.get_image(host, "tree"), events)


def ensure_tree(host: Host, events: Callable[[Event], None]) -> object:
    return halves.ensure_tree(host, published.get_image(host, "disk"), events)


def export(host: Host, events: Callable[[Event], None]) -> object:
    target = host.store.root.parent / "exported"
    target.unlink(missing_ok=True)
    return bundles.export(host, "tree", target, is_full=True, events=events)


def bring(host: Host, events: Callable[[Event], None]) -> object:
    return sources.bring(host, Wanted(name="brought", source=str(host.store.root.parent / "given")), events)


DEEDS: dict[str, Deed] = {"disk": ensure_disk, "tree": ensure_tree, "export": export, "import": bring}


def fill_store(host: Host, tree: Path, deed: str) -> None:
    """What a deed needs."""
    add_donor(host, tree)
    add_tree(host, "tree", tree)
    if deed == "tree":
        raw = make(tree, host.store.root.parent / "raw", "-t", "ext4")
        add_disk(host, "disk", raw)
    if deed == "import":
        with tempfile.TemporaryDirectory() as folder:
            other = Host(prepare(Path(folder)))
            add_tree(other, "tree", tree)
            bundles.export(other, "tree", Path(folder, "given"))
            shutil.move(Path(folder, "given"), host.store.root.parent / "given")


def made(host: Host, name: str, path: str) -> Path:
    return host.store.made(published.get_image(host, name).id) / path


def test_a_tree_becomes_a_disk_and_that_the_same_tree(host: Host, tree: Path) -> None:
    fill_store(host, tree, "disk")
    image = halves.ensure_disk(host, published.get_image(host, "tree"))
    assert image.disk is not None and image.kernel is not None
    assert (image.kernel_release, image.kernel_arguments) == (RELEASE, ("root=/dev/vda", "fstab=no"))
    assert made(host, "tree", "disk/vmlinuz").read_text() == "vmlinuz of the donor"
    add_disk_of = replace(
        plain("back"), disk=replace(image.disk, artefact=replace(image.disk.artefact, file="disk.qcow2"))
    )

    def fill(work: Building) -> Image:
        subprocess.run(["cp", str(made(host, "tree", "disk/disk.qcow2")), str(work.image)], check=True, timeout=60)
        return add_disk_of

    halves.ensure_tree(host, add(host, "back", fill))
    found, wanted = trees.fingerprint(made(host, "back", "tree/rootfs")), trees.fingerprint(tree)
    donated = {path for path in found if path.startswith("usr/lib/modules")}
    assert f"usr/lib/modules/{RELEASE}/kernel/drivers/one.ko" in donated
    for path in donated:
        del found[path]
    for description in (found, wanted):
        del description["usr/lib"]  # has the modules' directory in it now
    assert found == wanted


def test_a_foreign_disk_with_partitions_becomes_a_tree(host: Host, tree: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.touch()
    os.truncate(raw, 120 * MIB)
    subprocess.run(["sfdisk", "-q", str(raw)], input=b"label: gpt\nsize=8MiB\nsize=64MiB\n", check=True, timeout=30)
    make(tree, raw, "-t", "ext4", offset=9 * MIB)
    image = halves.ensure_tree(host, add_disk(host, "disk", raw))
    assert image.has_tree
    found, wanted = trees.fingerprint(made(host, "disk", "tree/rootfs")), trees.fingerprint(tree)
    assert found == wanted


def test_fifty_at_once_make_it_once(host: Host, tree: Path) -> None:
    fill_store(host, tree, "disk")
    notes: list[str] = []
    failures: list[BaseException] = []

    def one() -> None:
        try:
            assert ensure_disk(host, lambda event: notes.append(event.text) if isinstance(event, Note) else None)
        except BaseException as error:  # noqa: BLE001  told by the test
            failures.append(error)

    threads = [threading.Thread(target=one) for _number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert failures == []
    assert sum("once" in note for note in notes) == 1


def events_of(deed: str, tree: Path, top: Path) -> int:
    """Of how many tasks it tells."""
    top.mkdir()
    host = Host(prepare(top))
    fill_store(host, tree, deed)
    if deed == "export":
        ensure_disk(host, lambda _event: None)
    told: list[str] = []
    DEEDS[deed](host, functools.partial(note_task, told))
    return len(told)


def note_task(told: list[str], event: Event) -> None:
    """How often it tells of the same task is a matter of time."""
    if isinstance(event, Progress) and event.task not in told[-1:]:
        told.append(event.task)


def die(deed: str, number: int, host: Host, _name: str) -> object:
    """Do it, and die when it tells of a task for this time."""
    told: list[str] = []

    def count(event: Event) -> None:
        note_task(told, event)
        if len(told) > number:
            os.kill(os.getpid(), signal.SIGKILL)

    return DEEDS[deed](host, count)


@pytest.mark.apart
@pytest.mark.guest  # for the time that they take
@pytest.mark.parametrize("deed", DEEDS)
def test_killed_at_any_step_nothing_half_made_stays(tree: Path, tmp_path: Path, deed: str) -> None:
    count = events_of(deed, tree, tmp_path / "counted")
    assert count > 2
    (tmp_path / "killed").mkdir()
    settings = prepare(tmp_path / "killed")
    host = Host(settings)
    fill_store(host, tree, deed)
    if deed == "export":
        ensure_disk(host, lambda _event: None)
    before = sorted(path for path in settings.store.rglob("*"))
    for number in range(count - 1):  # the last one is told when all is done
        victims.die_in(settings, functools.partial(die, deed, number), "")
        wait_until_free(host)
        gc.collect_building(host)
        if deed != "export" and sorted(settings.store.rglob("*")) != before:
            assert number >= count - 3, f"something stays of what was killed at {number}"
        assert sorted(settings.store.glob("building/*")) == []
    DEEDS[deed](host, lambda _event: None)


def wait_until_free(host: Host) -> None:
    """A program that the killed one has started still holds its lock until it ends."""
    for name in os.listdir(host.store.building):
        with host.lock(f"building-{name}", timeout_s=60):
            pass


def take_all(descriptor: int, left_bytes: int) -> None:
    """Take what is free but for so much, from somebody who goes on to take it meanwhile."""
    while True:
        facts = os.fstatvfs(descriptor)
        free_bytes = facts.f_bavail * facts.f_frsize - left_bytes
        if free_bytes <= 0:
            return
        with contextlib.suppress(OSError):
            os.posix_fallocate(descriptor, 0, free_bytes)
            return


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 600 MiB."""
    top = tmp_path / "small"
    top.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600m", "tmpfs", str(top)], check=True, timeout=30)
    yield top
    subprocess.run(["umount", "-l", str(top)], check=True, timeout=30)


@pytest.mark.apart
@pytest.mark.guest  # for the time that they take
@pytest.mark.parametrize("left_bytes", [0, 256 * 1024])
@pytest.mark.parametrize("deed", DEEDS)
def test_a_store_that_fills_up_is_told_and_left_as_it_was(tree: Path, small: Path, deed: str, left_bytes: int) -> None:
    """Somebody else takes all the space, or nearly, as soon as the work has begun."""
    host = Host(prepare(small))
    fill_store(host, tree, deed)
    before, ballast = sorted(host.store.root.rglob("*")), small / "ballast"

    def take(event: Event) -> None:
        if isinstance(event, Progress) and not ballast.exists():
            with ballast.open("wb") as file:
                take_all(file.fileno(), left_bytes)

    with pytest.raises(HvctlError) as caught:
        DEEDS[deed](host, take)
    assert ballast.exists()
    said = f"{caught.value.message} {caught.value.hint}"
    assert "space" in said or "full" in said, said
    assert "\n" not in caught.value.message
    assert sorted(host.store.root.rglob("*")) == before


def test_too_little_space_is_seen_before_anything_is_made(tree: Path, small: Path) -> None:
    host = Host(prepare(small))
    fill_store(host, tree, "disk")
    (small / "ballast").write_bytes(bytes(400 * MIB))
    with pytest.raises(HostError, match="are free"):
        ensure_disk(host, lambda _event: None)
    assert not list(host.store.building.iterdir())


def test_a_disk_without_a_system_says_so(host: Host, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    image = add_disk(host, "disk", make(tmp_path / "nothing", tmp_path / "raw", "-t", "ext4"))
    with pytest.raises(InvalidSpec, match="no Linux root"):
        halves.ensure_tree(host, image)
    assert not host.store.made(image.id).exists()


def test_only_who_is_trusted_is_read_by_the_kernel(host: Host, tree: Path, tmp_path: Path) -> None:
    image = add_disk(host, "disk", make(tree, tmp_path / "raw", "-t", "ext4", "-O", "meta_bg,^resize_inode"))
    with pytest.raises(Unsupported, match="meta_bg") as caught:
        halves.ensure_tree(host, image)
    assert "--trust-image" in caught.value.hint
    assert halves.ensure_tree(host, image, is_trusted=True).has_tree
    assert '"read_by": "kernel"' in made(host, "disk", "tree/half.json").read_text()
    found, wanted = trees.fingerprint(made(host, "disk", "tree/rootfs")), trees.fingerprint(tree)
    assert {path: found.get(path) for path in wanted} == wanted


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_file_systems_that_only_the_kernel_reads_need_that_trust(
    host: Host, tree: Path, tmp_path: Path, kind: str
) -> None:
    raw = tmp_path / "raw"
    raw.touch()
    os.truncate(raw, 400 * MIB)
    if kind == "btrfs":  # as Fedora has it: the root in a subvolume, which looks like a directory
        (tmp_path / "top").mkdir()
        shutil.copytree(tree, tmp_path / "top/root", symlinks=True)
        command = ["mkfs.btrfs", "-q", "--rootdir", str(tmp_path / "top"), str(raw)]
    else:
        command = ["mkfs.xfs", "-q", str(raw)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    if kind == "xfs":
        with layereddisk.mounted(raw) as root:
            subprocess.run(["cp", "--archive", f"{tree}/.", str(root)], check=True, timeout=60)
    image = add_disk(host, "disk", raw)
    with pytest.raises(Unsupported, match=f"its root on {kind}, which only this host's kernel could read"):
        halves.ensure_tree(host, image)
    assert not host.store.made(image.id).exists()
    assert halves.ensure_tree(host, image, is_trusted=True).has_tree
    assert (made(host, "disk", "tree/rootfs") / "etc/os-release").read_bytes() == (tree / "etc/os-release").read_bytes()
    assert halves.ensure_tree(host, published.get_image(host, "disk")).has_tree  # asked once
    assert str(host.store.root) not in Path("/proc/mounts").read_text()


def test_a_tree_without_an_init_is_no_vm(host: Host, tmp_path: Path) -> None:
    add_donor(host, tmp_path)
    (tmp_path / "files/etc").mkdir(parents=True)
    with pytest.raises(InvalidSpec, match="has no sbin/init"):
        halves.ensure_disk(host, add_tree(host, "tree", tmp_path / "files"))


def test_without_a_kernel_to_give_the_next_step_is_named(host: Host, tree: Path) -> None:
    with pytest.raises(NotFound) as caught:
        halves.ensure_disk(host, add_tree(host, "tree", tree))
    assert "image build donor" in caught.value.hint


def test_identity_goes_and_the_rest_stays(tree: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-a", str(tree), str(copy)], check=True, timeout=30)
    # Links that lead out are not followed.
    outside = tmp_path / "outside"
    (outside / "instances").mkdir(parents=True)
    (copy / "var/lib/dhcp").symlink_to(outside)
    (copy / "var/lib/cloud").joinpath(*["deep"] * 150).mkdir(parents=True)
    identityfiles.remove(copy)
    gone = set(trees.fingerprint(tree)) - set(trees.fingerprint(copy))
    assert gone == {
        "etc/hostname",
        "etc/ssh/ssh_host_rsa_key",
        "var/lib/cloud/instances",
        "var/lib/cloud/instances/x",
        "var/lib/cloud/instances/x/sem",
        "var/log/journal/y",
        "var/log/journal/y/system.journal",
    }
    assert (copy / "etc/machine-id").read_bytes() == b""
    assert (outside / "instances").is_dir()


def test_identity_goes_from_a_disk_too(host: Host, tree: Path, tmp_path: Path) -> None:
    """Of a root in a partition; the file system stays whole, and nothing is left in what it does not use."""
    with building.begin(host, "work", lambda _event: None) as work:
        raw = RawDisk(work=work, subject="work", virtual_bytes=120 * MIB)
        raw.path.touch()
        os.truncate(raw.path, raw.virtual_bytes)
        subprocess.run(["sfdisk", "-q", str(raw.path)], input=b"label: dos\nsize=64MiB\n", check=True, timeout=30)
        make(tree, raw.path, "-t", "ext4", offset=MIB)
        root, _parts = raw.find_root()
        assert root is not None
        assert raw.path.read_bytes().count(b"secret") >= 3
        raw.remove_identity(root)
        assert b"secret" in raw.path.read_bytes()
        raw.trim()
        assert b"secret" not in raw.path.read_bytes()
        raw.pack(root, "after.tar")
        (tmp_path / "after").mkdir()
        words = ["tar", "-C", str(tmp_path / "after"), "-xpf", str(work.directory / "after.tar")]
        subprocess.run(words, check=True, timeout=60)
    gone = set(trees.fingerprint(tree)) - set(trees.fingerprint(tmp_path / "after"))
    assert {"etc/hostname", "etc/ssh/ssh_host_rsa_key", "var/lib/cloud/instances"} < gone
    assert len(gone) == 7
    assert (tmp_path / "after/etc/machine-id").read_bytes() == b""


def test_what_was_exported_comes_back_the_same(host: Host, tree: Path, tmp_path: Path) -> None:
    add_donor(host, tree)
    image = add_tree(host, "tree", tree)
    first = bundles.export(host, "tree", tmp_path / "first")
    assert (tmp_path / "first").stat().st_mode & 0o777 == 0o600  # password hashes may be in it
    (tmp_path / "other").mkdir()
    other = Host(prepare(tmp_path / "other"))
    brought = sources.bring(other, Wanted(name="brought", source=str(tmp_path / "first"), sha256=first.sha256))
    assert brought.id == image.id, (brought, image)
    assert trees.fingerprint(other.store.image_tree(image.id)) == trees.fingerprint(tree)
    second = bundles.export(other, "brought", tmp_path / "second")
    assert second.sha256 == first.sha256
    with pytest.raises(AlreadyExists):
        bundles.export(host, "tree", tmp_path / "first")


def test_with_both_halves_nothing_is_to_be_made(host: Host, tree: Path, tmp_path: Path) -> None:
    add_donor(host, tree)
    add_tree(host, "tree", tree)
    bundles.export(host, "tree", tmp_path / "full", is_full=True)
    (tmp_path / "other").mkdir()
    other = Host(prepare(tmp_path / "other"))
    brought = sources.bring(other, Wanted(name="brought", source=str(tmp_path / "full")))
    assert brought.has_tree and brought.disk is not None and brought.kernel_release == RELEASE
    assert halves.ensure_disk(other, brought) == halves.ensure_tree(other, brought) == brought


@pytest.mark.parametrize("damage", ["cut", "flipped", "another"])
def test_a_damaged_file_is_refused(host: Host, tree: Path, tmp_path: Path, damage: str) -> None:
    add_tree(host, "tree", tree)
    bundles.export(host, "tree", tmp_path / "file")
    content = bytearray((tmp_path / "file").read_bytes())
    if damage == "cut":
        del content[-1000:]
    elif damage == "flipped":
        content[len(content) // 2] ^= 0x10
    else:
        content[:] = content[:20] + b"\x28\xb5\x2f\xfd" + bytes(100)
    (tmp_path / "file").write_bytes(content)
    before = sorted(host.store.root.rglob("*"))
    with pytest.raises((InvalidSpec, HostError)) as caught:
        sources.bring(host, Wanted(name="brought", source=str(tmp_path / "file")))
    assert "\n" not in caught.value.message
    assert sorted(host.store.root.rglob("*")) == before
