"""libvirt's daemons: started where they do not answer."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator

from hvctl.errors import HostError, HvctlError
from hvctl.host import Host
from hvctl.hostsetup.change import Change
from hvctl.hostside import daemons, filters
from hvctl.libvirtapi import survey
from hvctl.model import Mode

_START_TIMEOUT_S = 60


def missing(host: Host) -> Iterator[Change]:
    if not is_answering(host):
        if daemons.has_systemd():
            yield Change(text="start libvirtd (systemctl)", apply=functools.partial(_start_units, host))
        else:
            if not daemons.find_running("virtlogd"):
                yield Change(text="start virtlogd", apply=functools.partial(host.shell.call, daemons.start_virtlogd))
            how = " without the hybrid cgroup mount" if daemons.is_hybrid() else ""
            yield Change(text=f"start libvirtd{how}", apply=functools.partial(_start_libvirtd, host))
    if host.shell.call(daemons.has_lxcfs) and not daemons.find_running("lxcfs"):
        yield Change(text="start lxcfs", apply=functools.partial(host.shell.call, daemons.ensure_lxcfs))


def present(host: Host) -> Iterator[Change]:
    """Those that setup started, unless a domain of anybody's runs or another store's network still needs them."""
    started = [] if filters.list_networks(but=host.config.network) else daemons.list_started()
    if started and not any(survey.has_active_domain(host.connection(mode)) for mode in Mode):
        yield Change(text=f"stop {', '.join(started)}", apply=functools.partial(_stop, host))


def is_answering(host: Host) -> bool:
    """Whether both drivers answer."""
    try:
        for mode in Mode:
            host.connection(mode)
    except HvctlError:
        return False
    return True


def _start_units(host: Host) -> None:
    host.shell.run(["systemctl", "start", "virtlogd.socket", "libvirtd.service"], timeout_s=_START_TIMEOUT_S)
    _wait(host)


def _start_libvirtd(host: Host) -> None:
    host.shell.call(daemons.start_libvirtd)
    _wait(host)


def _wait(host: Host) -> None:
    """A daemon that has gone into the background may not have its socket yet, and nobody tells when it has."""
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while not is_answering(host):
        if time.monotonic() > deadline_s:
            raise HostError(
                "libvirtd was started but does not answer", hint="see why: journalctl -u libvirtd, or libvirtd -v"
            )
        host.pause(0.05)
    survey.look_at_qemu(host.connection(Mode.VM))  # takes seconds the first time: here, not in somebody's `create`


def _stop(host: Host) -> None:
    host.close()
    host.shell.call(daemons.stop_started)
