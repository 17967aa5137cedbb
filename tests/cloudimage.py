"""A disk as distributions publish them: GPT, an EFI system partition with systemd-boot, Debian with cloud-init."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_PACKAGES = (
    "systemd systemd-sysv udev dbus kmod iproute2 openssh-server linux-image-cloud-amd64 initramfs-tools cloud-init "
    "e2fsprogs cloud-guest-utils"
)
_MIB = 1024**2
_ESP_MIB, _ROOT_MIB = 80, 1400
_ENTRY = "title test\nlinux /vmlinuz\ninitrd /initrd\noptions root=/dev/vda2 ro console=ttyS0 net.ifnames=0\n"
# What cloud images have that minbase has not: a network that is brought up, DNS left to somebody else, and a locale
# that is there (cloud-init wants en_US.UTF-8 by itself, and fails without).
_CUSTOMIZE = (
    'chroot "$1" systemctl enable systemd-networkd && echo "LABEL=root / ext4 defaults 0 1" >"$1/etc/fstab"'
    ' && echo "locale: C.UTF-8" >"$1/etc/cloud/cloud.cfg.d/90-locale.cfg"'
)


def build(folder: Path) -> Path:
    """Build it from the Debian mirror in a minute or two; gives the qcow2 file."""
    tree, disk = folder / "tree", folder / "disk.raw"
    words = ["mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory", "--quiet"]
    words += [f"--include={','.join(_PACKAGES.split())}", f"--customize-hook={_CUSTOMIZE}", "bookworm", str(tree)]
    _run(*words)
    _run("mke2fs", "-q", "-t", "ext4", "-L", "root", "-d", str(tree), str(folder / "root.img"), f"{_ROOT_MIB}M")
    _make_esp(folder, tree)
    with disk.open("wb") as stream:
        stream.truncate((_ESP_MIB + _ROOT_MIB + 4) * _MIB)
    layout = (
        f"label: gpt\nstart=1MiB, size={_ESP_MIB}MiB, type=U\nstart={_ESP_MIB + 1}MiB, size={_ROOT_MIB}MiB, type=L\n"
    )
    subprocess.run(["sfdisk", "--quiet", str(disk)], input=layout, text=True, check=True, timeout=60)
    for part, start in (("esp.img", 1), ("root.img", _ESP_MIB + 1)):
        _run("dd", f"if={folder / part}", f"of={disk}", "bs=1M", f"seek={start}", "conv=notrunc,sparse", "status=none")
    _run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(disk), str(folder / "cloud.qcow2"))
    for path in (tree, disk, folder / "root.img"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder / "cloud.qcow2"


def _make_esp(folder: Path, tree: Path) -> None:
    esp = folder / "esp.img"
    _run("mkfs.vfat", "-C", str(esp), str(_ESP_MIB * 1024))
    (folder / "entry.conf").write_text(_ENTRY)
    (folder / "loader.conf").write_text("timeout 0\n")
    for name in ("EFI", "EFI/BOOT", "loader", "loader/entries"):
        _run("mmd", "-i", str(esp), f"::/{name}")
    files = {
        Path("/usr/lib/systemd/boot/efi/systemd-bootx64.efi"): "EFI/BOOT/BOOTX64.EFI",
        next((tree / "boot").glob("vmlinuz-*")): "vmlinuz",
        next((tree / "boot").glob("initrd.img-*")): "initrd",
        folder / "entry.conf": "loader/entries/test.conf",
        folder / "loader.conf": "loader/loader.conf",
    }
    for source, target in files.items():
        _run("mcopy", "-i", str(esp), str(source), f"::/{target}")


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=900)
