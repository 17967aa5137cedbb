"""Real systems from elsewhere, started as what they did not come as."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvctl import images
from hvctl.access import keys
from hvctl.host import Host
from hvctl.instances import create, enter, lifecycle
from hvctl.instances.create import Request
from hvctl.model import Mode, Spec, Wait
from hvctl.rootfs import published
from hvctl.rootfs.sources import Wanted
from hvctl.units import GIB, MIB

pytestmark = pytest.mark.guest

NAME = "foreign"


@pytest.fixture
def tree(host: Host, debian_image: str) -> Path:
    return host.store.image_tree(published.get_image(host, debian_image).id)


@pytest.fixture
def nobody(host: Host) -> Iterator[None]:
    """Nothing is left of an instance and an image of that name."""
    yield
    for instance in [item.name for item in host.instances() if item.name == NAME]:
        lifecycle.delete(host, instance)
    if published.find_image(host, NAME):
        images.delete(host, NAME)


def start(host: Host, mode: Mode) -> None:
    spec = Spec(name=NAME, mode=mode, image=NAME, memory_bytes=512 * MIB)
    create.create(host, Request(spec=spec, authorized_keys=(keys.ensure_own_key(),), wait=Wait.AGENT))


def sh(host: Host, script: str) -> list[str]:
    done = enter.exec_(host, NAME, ("sh", "-s"), script.encode())
    assert done.status == 0, done.stderr.decode()
    return done.stdout.decode().split()


def test_a_foreign_disk_runs_as_a_container(host: Host, tree: Path, nobody: None, tmp_path: Path) -> None:
    """Partitions, a boot loader's place, the root in the second: as cloud images are."""
    raw = tmp_path / "disk.raw"
    raw.touch()
    os.truncate(raw, 3 * GIB)
    subprocess.run(["sfdisk", "-q", str(raw)], input=b"label: gpt\nsize=8MiB\nsize=2GiB\n", check=True, timeout=30)
    words = ["mke2fs", "-q", "-F", "-t", "ext4", "-E", f"offset={9 * MIB}", "-d", str(tree), "--", str(raw), "2g"]
    subprocess.run(words, check=True, capture_output=True, timeout=120)
    images.bring(host, Wanted(name=NAME, source=str(raw)))
    start(host, Mode.CONTAINER)
    assert sh(host, "cat /proc/1/comm; stat -c %U:%a /etc/shadow /usr/bin/passwd; getcap /usr/bin/ping || :")[:3] == [
        "systemd",
        "root:640",
        "root:4755",
    ]


@pytest.mark.long
def test_a_tree_without_a_kernel_boots_as_a_vm(host: Host, tree: Path, nobody: None, tmp_path: Path) -> None:
    """As containers' trees are; an fstab about another disk does not hold it up."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/fstab").write_text("UUID=0000-0000 /boot/efi vfat defaults 0 0\n")
    archive = tmp_path / "tree.tar"
    without = ["--exclude=./boot/*", "--exclude=./usr/lib/modules", "--exclude=./usr/lib/hvctl/kernel"]
    words = ["tar", "--numeric-owner", "--xattrs", *without, "-C", str(tree), "-cf", str(archive), "."]
    subprocess.run([*words, "-C", str(tmp_path), "./etc/fstab"], check=True, timeout=120)
    images.bring(host, Wanted(name=NAME, source=str(archive)))
    start(host, Mode.VM)
    lender = published.get_image(host, host.config.image)
    assert sh(
        host, "uname -r; modprobe overlay; grep -c ^overlay /proc/modules; systemctl is-system-running --wait"
    ) == [
        lender.kernel_release,
        "1",
        "running",
    ]
