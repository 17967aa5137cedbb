"""Facts about a machine that decide how guests run on it, each read in microseconds."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import re
import socket
import stat
from collections.abc import Sequence
from pathlib import Path

KVM = Path("/dev/kvm")
_EMULATED_CPUS = ("QEMU TCG CPU", "QEMU Virtual CPU")


def find_program(names: Sequence[str]) -> str:
    """The path of the first of these programs that is installed, or an empty string."""
    import shutil  # here: its compressors cost a short command 3 ms

    return next((path for name in names if (path := shutil.which(name))), "")


def acceleration_key(qemu: str) -> str:
    """A line that changes when a verdict on the accelerator may change: another boot, QEMU binary or `/dev/kvm`.

    Size and mtime stand for QEMU's version, which only QEMU itself could tell. Raises OSError without the binary.
    """
    facts = os.stat(qemu)
    parts = [read_boot_id(), qemu, str(facts.st_size), str(facts.st_mtime_ns)]
    try:
        device = KVM.stat()
        parts.append(f"{device.st_ino}:{device.st_rdev}:{device.st_mode:o}:{device.st_uid}:{device.st_gid}")
    except OSError:
        parts.append("no kvm")
    return " ".join(parts)


def read_boot_id() -> str:
    """The kernel's identifier of this boot (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def find_kvm_problem() -> tuple[str, bool]:
    """Why KVM cannot even be tried, or an empty string; and whether that is so for every user of the host."""
    architecture = os.uname().machine
    if architecture != "x86_64":
        return f"guests are x86_64, this host is {architecture}", True
    try:
        os.close(os.open(KVM, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return f"{KVM} does not exist ({_read_virtualisation()})", True
    except PermissionError:
        return f"this user (uid {os.geteuid()}) has no permission to open {KVM}", False
    except OSError as error:
        return f"{KVM} does not open: {error.strerror}", True
    return "", True


def is_emulated() -> bool:
    """Whether this machine's own processor is emulated in software."""
    return any(name in _read_cpuinfo() for name in _EMULATED_CPUS)


def _read_virtualisation() -> str:
    flags = _read_cpuinfo().partition("\nflags")[2].partition("\n")[0].split()
    for flag, module in (("svm", "kvm_amd"), ("vmx", "kvm_intel")):
        if flag in flags:
            return f"the processor has virtualisation, the kernel module {module} is not loaded"
    return "the processor offers no virtualisation"


def _read_cpuinfo() -> str:
    return Path("/proc/cpuinfo").read_text(errors="replace")


def find_user_name(uid: int) -> str:
    """The name of a user, or an empty string."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""


def describe_access(path: Path) -> tuple[int, str, str] | None:
    """Mode bits, owner and group (names where they have one) of what a path names, or None when it is not there."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return None
    try:
        group = grp.getgrgid(facts.st_gid).gr_name
    except KeyError:
        group = str(facts.st_gid)
    return stat.S_IMODE(facts.st_mode), find_user_name(facts.st_uid) or str(facts.st_uid), group


def connect(path: Path) -> None:
    """Connect to a unix socket and hang up. Raises OSError when nobody listens there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(5)
        try:
            connection.connect(os.fspath(path))
        except OSError as error:
            raise OSError(error.errno or errno.ETIMEDOUT, error.strerror or str(error), os.fspath(path)) from error


def find_text(path: Path) -> str | None:
    """A small text file, or None when it is not there."""
    try:
        return path.read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None


def find_nearest(path: Path) -> Path:
    """The path itself, or the nearest of its parents that exists."""
    return next(candidate for candidate in (path, *path.parents) if candidate.exists())


def measure_space(path: Path) -> tuple[int, int, int]:
    """Bytes free for this user, bytes in all, free inodes (-1 where the file system has no such count)."""
    facts = os.statvfs(path)
    inodes = facts.f_favail if facts.f_files else -1
    return facts.f_bavail * facts.f_frsize, facts.f_blocks * facts.f_frsize, inodes


def find_pair(candidates: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    """The first pair of files of which both are there; the first of all when none is."""
    return next((pair for pair in candidates if all(os.path.exists(path) for path in pair)), candidates[0])


def find_file(candidates: tuple[str, ...]) -> str:
    """The first of these files that is there; the first of all when none is."""
    return next((path for path in candidates if os.path.isfile(path)), candidates[0])


def is_static(program: Path) -> bool:
    """Whether a file is an x86-64 program that needs no other file to run: one without an interpreter (elf(5))."""
    try:
        with program.open("rb") as stream:
            head = stream.read(4096)
    except OSError:
        return False
    if head[:5] != b"\x7fELF\x02" or head[18:20] != b"\x3e\x00":
        return False
    start, size, count = (int.from_bytes(head[a:b], "little") for a, b in ((32, 40), (54, 56), (56, 58)))
    kinds = [int.from_bytes(head[start + n * size :][:4], "little") for n in range(count)]
    return 3 not in kinds  # PT_INTERP


def virtualisation_features() -> tuple[str, ...]:
    """The CPU's virtualisation extension by libvirt's name, `vmx` or `svm`, as a tuple of one; empty without one."""
    flags = set()
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
        for line in lines:
            if line.startswith("flags"):
                flags = set(line.partition(":")[2].split())
                break
    return tuple(feature for feature in ("vmx", "svm") if feature in flags)


def total_memory_bytes() -> int:
    """The memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def count_cpus() -> int:
    """The CPUs of this machine."""
    return os.cpu_count() or 1


def parse_cpuset(text: str) -> set[int]:
    """The numbers in a list of CPUs, `0-3,8` (cpuset(7), list format). Raises ValueError."""
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part, re.ASCII)
        if match is None:
            raise ValueError(f"not a number or range: {part!r}")
        first, last = match.groups()
        numbers = range(int(first), int(last or first) + 1)
        if not numbers or numbers[-1] > 8191:
            raise ValueError(f"not a range: {part!r}")
        chosen.update(numbers)
    return chosen
