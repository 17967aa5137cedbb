"""What to build: a checked request, from the words that a user gives."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hvctl.errors import InvalidSpec
from hvctl.rootfs.published import check_tag
from hvctl.units import GIB, TIB, format_size
from hvctl.values import dataclass

DEFAULT_DISK_BYTES = 10 * GIB
# The tree takes 0.5 GiB; a guest that cannot install anything is of no use.
_LEAST_DISK_BYTES = 2 * GIB
_MOST_DISK_BYTES = 16 * TIB

# Debian's version -> its code name.
SUITES = {"12": "bookworm", "13": "trixie"}

# Debian policy, 5.6.1; nothing else that apt would accept there (versions, suites, options, paths, removals).
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]{1,99}", re.ASCII)
_MOST_PACKAGES = 500


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """An image to build."""

    name: str
    version: str
    """Debian's version, a key of SUITES."""
    packages: tuple[str, ...] = ()
    disk_bytes: int = DEFAULT_DISK_BYTES

    @property
    def suite(self) -> str:
        return SUITES[self.version]


def parse_request(
    name: str, *, suite: str = "", packages: Sequence[str] = (), disk_bytes: int = DEFAULT_DISK_BYTES
) -> BuildRequest:
    """A checked request. Without a suite, the name must say it: `debian-12`, `debian-13`, `bookworm`, `trixie`.

    Raises InvalidSpec for anything that cannot be built.
    """
    check_tag(name)
    version = _parse_suite(suite or name)
    if version is None:
        known = ", ".join(f"debian-{version}" for version in SUITES)
        what = f"there is no suite {suite[:40]!r}" if suite else f"the name {name!r} does not say which suite to build"
        raise InvalidSpec(what, hint=f"hvctl image build {name} --suite debian-12 (known: {known})")
    for package in packages:
        if not _PACKAGE.fullmatch(package):
            raise InvalidSpec(
                f"{package[:80]!r} is not the name of a package", hint="search one: apt-cache search WORD"
            )
    if len(packages) > _MOST_PACKAGES:
        raise InvalidSpec(
            f"{len(packages)} packages are more than {_MOST_PACKAGES}",
            hint="build without them, install them in the guest",
        )
    if not _LEAST_DISK_BYTES <= disk_bytes <= _MOST_DISK_BYTES:
        raise InvalidSpec(
            f"a root disk of {format_size(disk_bytes)} is not possible",
            hint=f"--disk {format_size(_LEAST_DISK_BYTES)} to {format_size(_MOST_DISK_BYTES)}",
        )
    # ext4 and qemu-img count in blocks.
    return BuildRequest(
        name=name,
        version=version,
        packages=tuple(sorted(set(packages))),
        disk_bytes=disk_bytes // 4096 * 4096,
    )


def is_buildable(name: str) -> bool:
    """Whether the name alone says what to build."""
    return _parse_suite(name) is not None


def _parse_suite(text: str) -> str | None:
    for version, code_name in SUITES.items():
        if text in (version, code_name, f"debian-{version}"):
            return version
    return None
