"""A built image: what is in it, what is not, and what becomes of builds that fail or are killed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hvctl import gc, images
from hvctl.errors import CommandFailed, NotFound, WrongState
from hvctl.host import Host
from hvctl.instances import create, lifecycle
from hvctl.instances.create import Request
from hvctl.model import Image
from hvctl.rootfs import aptconfig, manifest, published
from tests import tiny

pytestmark = pytest.mark.guest

_BUILD = """
import sys
from pathlib import Path
from hvctl import images
from hvctl.config import Config
from hvctl.host import Host
images.build(Host(Config(store=Path(sys.argv[1]), run=Path(sys.argv[2]))), images.parse_request("debian-12"))
"""


@pytest.fixture(scope="module")
def image(host: Host, debian_image: str) -> Image:
    return published.get_image(host, debian_image)


@pytest.fixture(scope="module")
def folder(host: Host, image: Image) -> Path:
    return host.store.image(image.id)


@pytest.fixture(scope="module")
def tree(folder: Path) -> Path:
    return folder / "tree" / "rootfs"


@pytest.fixture(scope="module")
def raw_disk(image: Image, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert image.disk is not None
    raw = tmp_path_factory.mktemp("disk") / "disk.raw"
    disk = folder / image.disk.artefact.file
    subprocess.run(["qemu-img", "convert", "-f", image.disk.format, "-O", "raw", disk, raw], check=True, timeout=120)
    return raw


@pytest.fixture(scope="module")
def mounted_disk(raw_disk: Path) -> Iterator[Path]:
    at = raw_disk.parent / "mounted"
    at.mkdir()
    subprocess.run(["mount", "-o", "ro,loop,noload", raw_disk, at], check=True, timeout=60)
    yield at
    subprocess.run(["umount", at], check=True, timeout=60)


def walk(top: Path) -> dict[str, tuple[object, ...]]:
    """Path -> type and mode, owner, and content of everything below; directories without their sizes."""
    found: dict[str, tuple[object, ...]] = {}
    for path in top.rglob("*"):
        facts = path.lstat()
        content = ""
        if stat.S_ISLNK(facts.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(facts.st_mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(top))] = (facts.st_mode, facts.st_uid, facts.st_gid, content)
    return found


def traces_of_the_host(host: Host) -> list[bytes]:
    """Words that only the building machine can have brought in: its name, its mirrors and proxies, the store."""
    public = ("deb.debian.org", "security.debian.org", "localhost", "debian")
    name = socket.gethostname()
    words = {host.store.root.name, *([name] if re.search(r"\d", name) else [])}  # else a word that stands anywhere
    words |= {source.uri.split("://")[-1].split("/")[0] for source in aptconfig.find_sources(host)}
    words |= {line.split('"')[1] for line in aptconfig.format_options(host).splitlines() if "Proxy" in line}
    return [word.encode() for word in sorted(words) if len(word) > 4 and word not in public]


def test_published_files_are_roots_and_read_only(folder: Path) -> None:
    found = {path.name: path.lstat() for path in [folder, *folder.iterdir()]}
    assert {name: stat.S_IMODE(facts.st_mode) for name, facts in found.items()} == {
        folder.name: 0o711,
        "disk.qcow2": 0o444,
        "vmlinuz": 0o444,
        "initrd": 0o444,
        "manifest.json": 0o444,
        "tree": 0o700,
    }
    assert {(facts.st_uid, facts.st_gid) for facts in found.values()} == {(0, 0)}


def test_digests_are_those_of_the_files(image: Image, folder: Path) -> None:
    assert image.disk and image.kernel and image.initrd
    for part in (image.disk.artefact, image.kernel, image.initrd):
        content = (folder / part.file).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (part.size_bytes, part.sha256)


def test_tree_and_disk_are_the_same(tree: Path, mounted_disk: Path) -> None:
    on_disk = walk(mounted_disk)
    assert on_disk.pop("lost+found")
    assert on_disk == walk(tree)


def test_nothing_tells_where_it_was_built(host: Host, folder: Path) -> None:
    words = traces_of_the_host(host)
    assert words
    # disk.qcow2 is not compressed: what stands in a file of the guest stands there too, outside of any file as well.
    pattern = [argument for word in words for argument in ("-e", word)]
    done = subprocess.run(["grep", "-rlaF", *pattern, folder], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (1, ""), words


def test_nothing_in_it_is_an_identity(tree: Path) -> None:
    assert (tree / "etc/machine-id").read_bytes() == b""
    for path in (
        "var/lib/dbus/machine-id",
        "etc/hostname",
        "var/lib/systemd/random-seed",
        "etc/apt/apt.conf.d/99mmdebstrap",
    ):
        assert not os.path.lexists(tree / path), path
    assert list((tree / "etc/ssh").glob("ssh_host_*")) == []
    left = [path for path in (tree / "var/log").rglob("*") if path.is_file() and not path.is_symlink()]
    left += [path for path in (tree / "var/lib/apt/lists").rglob("*") if path.is_file()]
    left += [*(tree / "run").iterdir(), *(tree / "tmp").iterdir(), *(tree / "root/.ssh").glob("*")]
    assert left == []


def test_its_sources_are_debians_own(tree: Path) -> None:
    files = list((tree / "etc/apt").rglob("*.sources"))
    assert not (tree / "etc/apt/sources.list").exists()
    uris = {line for path in files for line in path.read_text().splitlines() if line.startswith("URIs")}
    assert uris == {"URIs: http://deb.debian.org/debian", "URIs: http://deb.debian.org/debian-security"}


def test_there_are_no_device_nodes(tree: Path) -> None:
    assert [path for path in tree.rglob("*") if stat.S_ISBLK(m := path.lstat().st_mode) or stat.S_ISCHR(m)] == []


def test_a_package_that_does_not_exist_leaves_nothing(host: Host, image: Image) -> None:
    before = published.list_ids(host)
    request = images.parse_request(image.name, packages=["no-such-package-of-ours"])
    with pytest.raises(CommandFailed, match="no-such-package-of-ours"):
        images.build(host, request)
    assert published.list_ids(host) == before
    assert published.get_image(host, image.name) == image
    assert list(host.store.building.iterdir()) == []
    assert gc.collect(host) == ()


def test_a_killed_build_is_collected_once_nobody_works_on_it(host: Host) -> None:
    before = published.list_ids(host)
    builder = subprocess.Popen([sys.executable, "-c", _BUILD, host.store.root, host.store.run])
    name = wait_for_build(host)
    workers = processes_naming(name)
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):  # some live for milliseconds
            os.kill(pid, signal.SIGSTOP)  # or mmdebstrap would end by itself, having nobody to write to any more
    builder.kill()
    builder.wait(timeout=30)
    assert workers
    assert gc.collect(host) == ()  # mmdebstrap lives on, and the lock with it
    for pid in {*workers, *processes_naming(name)}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: not host.is_busy(f"building-{name}"))
    assert [item.what for item in gc.collect(host)] == [f"building {name}"]
    assert list(host.store.building.iterdir()) == []
    assert published.list_ids(host) == before


def wait_for_build(host: Host) -> str:
    """The name of the building directory whose tree is being filled."""
    until(lambda: any(path.joinpath("usr").exists() for path in host.store.building.glob("*/image/tree/rootfs")))
    (name,) = [path.name for path in host.store.building.iterdir()]
    return name


def processes_naming(word: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def until(is_true: object, timeout_s: float = 60) -> None:
    assert callable(is_true)
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.05)


@pytest.fixture
def disposable_image(host: Host) -> str:
    """A tiny image of its own name and content, with nobody on it."""
    return publish_tiny(host, "disposable", "1").name


def publish_tiny(host: Host, name: str, version: str) -> Image:
    """The tiny image under a name, told from its sisters by its version."""
    base = published.find_image(host, "tiny") or published.get_image(host, tiny.publish(host, "tiny"))
    image = manifest.seal(replace(base, name=name, version=version))
    aside = host.store.building / f"test-{version}"
    subprocess.run(["cp", "-a", host.store.image(base.id), aside], check=True, timeout=30)
    (aside / "manifest.json").unlink()
    (aside / "manifest.json").write_bytes(manifest.format_manifest(image))
    published.publish(host, aside, image)
    subprocess.run(["rm", "-rf", aside], check=True, timeout=30)
    return image


@pytest.mark.apart
def test_an_image_in_use_stays_and_its_users_are_named(host: Host, disposable_image: str) -> None:
    image = published.get_image(host, disposable_image)
    create.create(host, Request(spec=tiny.make_spec("image-user", image=disposable_image), start=False))
    try:
        with pytest.raises(WrongState, match="in use by image-user"):
            images.delete(host, disposable_image)
        assert published.get_image(host, disposable_image) == image
        assert images.get(host, disposable_image).users == ("image-user",)
    finally:
        lifecycle.delete(host, "image-user")
    images.delete(host, disposable_image)
    assert image.id not in published.list_ids(host)
    with pytest.raises(NotFound):
        images.delete(host, disposable_image)


@pytest.mark.apart
def test_a_name_that_moved_leaves_the_old_image_to_its_users(host: Host, disposable_image: str) -> None:
    old = published.get_image(host, disposable_image)
    create.create(host, Request(spec=tiny.make_spec("image-user", image=disposable_image), start=False))
    try:
        new = publish_tiny(host, disposable_image, "2")
        assert images.prune(host) == ()
        assert {old.id, new.id} <= set(published.list_ids(host))
    finally:
        lifecycle.delete(host, "image-user")
    assert images.prune(host) == (old.id,)
    assert published.get_image(host, disposable_image) == new
    images.delete(host, disposable_image)


@pytest.mark.apart
def test_an_image_with_two_names_goes_with_the_second(host: Host, disposable_image: str) -> None:
    image = published.get_image(host, disposable_image)
    (host.store.tags / "second").write_text(f"{image.id}\n")
    images.delete(host, disposable_image)
    assert image.id in published.list_ids(host)
    images.delete(host, "second")
    assert image.id not in published.list_ids(host)


@pytest.mark.apart
def test_a_removal_that_was_killed_half_way_is_finished_or_undone(host: Host, disposable_image: str) -> None:
    image = published.get_image(host, disposable_image)
    create.create(host, Request(spec=tiny.make_spec("image-user", image=disposable_image), start=False))
    try:
        going = host.store.images / f".going-{image.id}"
        host.store.image(image.id).rename(going)
        assert images.prune(host) == ()
        assert published.get_image(host, disposable_image) == image
    finally:
        lifecycle.delete(host, "image-user")
    host.store.image(image.id).rename(going)
    assert images.prune(host) == (image.id,)
    assert [item.problem != "" for item in images.list_images(host) if item.name == disposable_image] == [True]
    images.delete(host, disposable_image)
    assert disposable_image not in published.list_tags(host)
