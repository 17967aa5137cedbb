"""Confinement: a program that sees one directory and what it needs to load, with no network and under limits.

Made by bubblewrap, which does the namespaces, the private root and `no_new_privs` in some 10 ms and is looked after by
others, and prlimit(1). What it sees: its directory as `/work`, read-only `/usr` with the usual links, the files that
are bound for it, `/dev/null` and its like. No `/proc`: to uid 0 its `sys` is writable even without any capability. No
other process, no environment, and it dies with whoever started it.

A program without capabilities also gets a user namespace in which no further one can be made, so that those parts of the
kernel that only a namespace's root reaches stay out of reach. With capabilities (files of any owner are to be written)
there is none: bubblewrap maps one user.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path

from hvctl.values import dataclass

WORK = "/work"
"""The directory, as the program sees it."""
INPUTS = "/in"
"""Files that are bound for it by `place_input`."""
_CODE = "/code"
_SOURCE = Path(__file__).parent
CODE = ((_SOURCE, f"{_CODE}/hvctl/hostside"), (_SOURCE.parent / "values.py", f"{_CODE}/hvctl/values.py"))
"""This package, as `python_command` shows it to a program."""
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

WRITE_ANY_OWNER = ("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_SETFCAP")
"""What a tree with all its owners and modes takes."""
READ_ANY_OWNER = ("CAP_DAC_READ_SEARCH",)
"""What reading files takes that are not root's."""


@dataclass(frozen=True, kw_only=True)
class Confinement:
    """What a program may see and use. Limits are for each of its processes (setrlimit(2)); wall time is the caller's."""

    directory: Path
    """Its own, read-write, as `/work`."""
    read_only: tuple[tuple[Path, str], ...] = ()
    """Further files or directories: where they are, and where it sees them."""
    devices: tuple[str, ...] = ()
    """Device nodes besides /dev/null and its like, `/dev/fuse` for example."""
    capabilities: tuple[str, ...] = ()
    is_read_only: bool = False
    """Whether its own directory may not be written either."""
    cpu_s: int = 3600
    memory_bytes: int = 2 * 1024**3
    """Address space."""
    file_bytes: int = 64 * 1024**3
    """The longest file that it may write."""


def place_input(number: int) -> str:
    """Where a program sees the file number N that is given to it."""
    return f"{INPUTS}/{number}"


def is_plainly_readable(path: Path) -> bool:
    """Whether root may read a file without any capability: it is root's, or everybody's."""
    facts = path.stat()
    return facts.st_uid == 0 or bool(facts.st_mode & stat.S_IROTH)


def command(confinement: Confinement, argv: Sequence[str | PathLike[str]]) -> list[str]:
    """The words that run `argv` confined; nothing is done yet. Its status is the program's, 128 + N when signal N killed it."""
    # Soft and hard alike, the kernel would kill without saying why (setrlimit(2), SIGXCPU).
    limits = (
        f"--cpu={confinement.cpu_s}:{confinement.cpu_s + 5}",
        f"--as={confinement.memory_bytes}",
        f"--fsize={confinement.file_bytes}",
    )
    words = ["prlimit", *limits, "--core=0", "--nofile=1024", "--", "bwrap", "--die-with-parent", "--new-session"]
    words += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    words += ["--clearenv", "--setenv", "PATH", "/usr/sbin:/usr/bin", "--setenv", "LC_ALL", "C.UTF-8"]
    words += ["--cap-drop", "ALL"]
    for capability in confinement.capabilities:
        words += ["--cap-add", capability]
    if not confinement.capabilities:
        words += ["--unshare-user", "--disable-userns"]
    for path in _SYSTEM:
        words += ["--ro-bind-try", path, path]
    for device in (*_DEVICES, *confinement.devices):
        words += ["--dev-bind", device, device]
    words += ["--ro-bind" if confinement.is_read_only else "--bind", fspath(confinement.directory), WORK]
    for source, place in confinement.read_only:
        words += ["--ro-bind", fspath(source), place]
    # What is left is the sandbox's own root, in memory: nobody may fill that either.
    words += ["--remount-ro", "/", "--chdir", WORK, "--"]
    return [*words, *(fspath(word) for word in argv)]


def python_command(confinement: Confinement, module: str, arguments: Sequence[str]) -> list[str]:
    """The words that run `main(arguments)` of a module of this package confined, by the system's own python3."""
    with_code = replace(confinement, read_only=(*confinement.read_only, *CODE))
    return command(with_code, python_words(_CODE, module, arguments))


def python_words(code: str, module: str, arguments: Sequence[str]) -> list[str]:
    """The words that run `main(arguments)` of a module of this package, which lies in `code`, by the system's own python3."""
    program = (
        f"import sys; sys.path.insert(0, {code!r}); from hvctl.hostside import {module}; {module}.main(sys.argv[1:])"
    )
    return ["/usr/bin/python3", "-I", "-S", "-B", "-c", program, *arguments]
