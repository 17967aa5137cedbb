"""What libvirt starts instead of `libvirt_lxc` on a host without systemd: it makes the groups that nobody else makes.

libvirtd calls it with `libvirt_lxc`'s arguments, `--name NAME` among them, and waits for that program, which takes its
place here (same process, same descriptors). Quick and silent; what fails is on stderr, which libvirt shows.
"""

from __future__ import annotations

import os
import sys

PROGRAM = "/usr/local/lib/hvctl/emulator"
"""Where `hvctl host setup` installs it; definitions name this path."""
_PROGRAMS = ("/usr/lib/libvirt/libvirt_lxc", "/usr/libexec/libvirt_lxc")


def main(arguments: list[str]) -> None:
    """Join the container's groups, then become libvirt's own program."""
    sys.excepthook = give_up
    program = next((path for path in _PROGRAMS if os.access(path, os.X_OK)), _PROGRAMS[0])
    if "--name" in arguments:  # without: libvirt asks for the version
        from hvctl.hostside import groups

        groups.join(arguments[arguments.index("--name") + 1])
    os.execv(program, [program, *arguments[1:]])


def give_up(kind: type[BaseException], error: BaseException, _trace: object) -> None:
    """One line instead of a traceback."""
    sys.stderr.write(f"hvctl: the container's groups cannot be made: {kind.__name__}: {error}\n")
