"""What is shown of the log that libvirt keeps for a container's name."""

from __future__ import annotations

from hvctl.backends.container import _find_faults

MINE, THEIRS = "9e2d378b-ad87-49e3-96e9-095eacf23af4", "ac248949-fd42-4588-8282-86c6933cdcf4"


def start(uuid: str, *told: str) -> bytes:
    """As libvirt 9.0 writes one."""
    lines = (
        "2026-11-27 18:04:01.142+0000: starting up",
        "PATH=/bin LIBVIRT_DEBUG=3 /usr/local/lib/hvctl/emulator --name x --console 29",
        f"PATH=/bin:/sbin container=lxc-libvirt LIBVIRT_LXC_UUID={uuid} LIBVIRT_LXC_NAME=x /sbin/init",
        "2026-11-27 18:04:01.203+0000: 1: info : libvirt version: 9.0.0, package: 9.0.0-4+deb12u2 (Debian)",
        "2026-11-27 18:04:01.203+0000: 1: warning : lxcContainerUnmountSubtree:524 : Failed to unmount '/.oldroot'",
        *told,
    )
    return "".join(f"{line}\n" for line in lines).encode()


def test_only_what_went_wrong_at_the_last_start_is_shown() -> None:
    log = start(MINE, "an earlier error") + start(MINE, "an error", "another")
    assert _find_faults(log, MINE) == b"an error\nanother\n"
    assert _find_faults(start(MINE, "an earlier error") + start(MINE), MINE) == b""


def test_nothing_is_shown_of_another_that_had_the_name() -> None:
    assert _find_faults(start(THEIRS, "an error"), MINE) == b""
