"""The positive verdict, without any hardware: a guest whose emulated processor has SVM runs the probe, then a KVM guest.

Everything is baked into the guest's image beforehand; nothing is installed under emulation.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest

import hvctl

pytestmark = pytest.mark.long

PACKAGES = (
    "linux-image-cloud-amd64",
    "initramfs-tools",
    "kmod",
    "python3-minimal",
    "libpython3-stdlib",
    "qemu-system-x86",
)
BUILD_TIMEOUT_S = 900
BOOT_TIMEOUT_S = 600

# Process 1 of the guest. The nested guest has no disk: its kernel gets as far as mounting the root, and panics.
INIT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t tmpfs tmpfs /tmp; mount -t tmpfs tmpfs /run
modprobe kvm_amd
echo "CLAIM: uptime $(cut -d' ' -f1 /proc/uptime)"
PYTHONPATH=/opt python3 /opt/try.py
echo "CLAIM: uptime $(cut -d' ' -f1 /proc/uptime)"
timeout 300 qemu-system-x86_64 -nodefaults -display none -no-reboot -machine q35 -m 256M -accel kvm -cpu host \\
    -kernel /opt/vmlinuz -append 'console=ttyS0 panic=-1' -serial file:/tmp/nested.log
sed 's/^/NESTED: /' /tmp/nested.log | grep -E 'KVM|VFS: Unable to mount root'
echo "CLAIM: uptime $(cut -d' ' -f1 /proc/uptime)"
echo o > /proc/sysrq-trigger
sleep 60
"""

TRY = """
import time
from hvctl.accel import probe
from hvctl.shell import LocalShell
begun_s = time.monotonic()
verdict = probe.try_kvm(LocalShell(), "/usr/bin/qemu-system-x86_64")
print("CLAIM: verdict", verdict.line, f"(after {time.monotonic() - begun_s:.1f} s)")
"""


@pytest.fixture(scope="module")
def boot_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with disk, vmlinuz and initrd.img of a Debian that has QEMU, and this hvctl in /opt."""
    folder = tmp_path_factory.mktemp("nested")
    tree = folder / "tree"
    subprocess.run(
        ["mmdebstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", "bookworm", tree],
        check=True, timeout=BUILD_TIMEOUT_S, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    shutil.copytree(Path(hvctl.__file__).parent, tree / "opt" / "hvctl", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "opt" / "try.py").write_text(TRY)
    (tree / "opt" / "init").write_text(INIT)
    (tree / "opt" / "init").chmod(0o755)
    for name in ("vmlinuz", "initrd.img"):
        shutil.copy(next((tree / "boot").glob(f"{name}-*")), folder / name)
    shutil.copy(folder / "vmlinuz", tree / "opt")
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, folder / "disk", "2G"], check=True, timeout=300)
    shutil.rmtree(tree)
    return folder


def boot(folder: Path) -> str:
    """Everything that a guest with emulated SVM writes to its console until it powers off."""
    done = subprocess.run(
        [
            "qemu-system-x86_64", "-nodefaults", "-display", "none", "-no-reboot", "-machine", "q35",
            "-accel", "tcg", "-cpu", "max,la57=off", "-smp", "2", "-m", "1536M",
            "-drive", f"file={folder / 'disk'},format=raw,if=virtio", "-serial", "stdio",
            "-kernel", folder / "vmlinuz", "-initrd", folder / "initrd.img",
            "-append", "root=/dev/vda rw console=ttyS0 quiet init=/opt/init panic=-1",
        ],
        capture_output=True, text=True, errors="replace", timeout=BOOT_TIMEOUT_S, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_kvm_in_an_emulated_machine_with_svm_is_healthy_and_boots_a_guest(boot_files: Path) -> None:
    begun_s = time.monotonic()
    console = boot(boot_files)
    said = [line.strip() for line in console.splitlines() if line.startswith(("CLAIM: ", "NESTED: "))]
    print(f"{time.monotonic() - begun_s:.0f} s", *said, sep="\n")
    assert any(line.startswith("CLAIM: verdict kvm: 64-bit guest code ran at ") for line in said), console[-3000:]
    assert any(line.startswith("NESTED: ") and "VFS: Unable to mount root" in line for line in said), console[-3000:]
    assert any(line.startswith("NESTED: ") and "Hypervisor detected: KVM" in line for line in said)
