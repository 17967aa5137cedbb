"""Domains: what libvirt makes alike for both drivers, wrapped once."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import cast
from uuid import UUID
from xml.etree import ElementTree

import libvirt

from hvctl import metadata
from hvctl.errors import HvctlError, NotFound, TimedOut, WrongState
from hvctl.hostside import freezer, held
from hvctl.libvirtapi.connection import Connection
from hvctl.libvirtapi.faults import from_libvirt, in_words
from hvctl.model import Live, State
from hvctl.values import dataclass

_STATES = {
    libvirt.VIR_DOMAIN_NOSTATE: State.STOPPED,
    libvirt.VIR_DOMAIN_RUNNING: State.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: State.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: State.PAUSED,
    libvirt.VIR_DOMAIN_SHUTDOWN: State.STOPPING,
    libvirt.VIR_DOMAIN_SHUTOFF: State.STOPPED,
    libvirt.VIR_DOMAIN_CRASHED: State.CRASHED,
    libvirt.VIR_DOMAIN_PMSUSPENDED: State.SUSPENDED,
}

# Only causes that tell the user something the state does not.
_CAUSES = {
    (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR): "disk error: the host's disk is probably full",
    (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_WATCHDOG): "watchdog",
    (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_CRASHED): "the guest's kernel panicked",
    (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_STARTING_UP): "starting up",
    (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_CRASHED): "the guest crashed",
    (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_FAILED): "it failed to start, or its process died",
    (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_SAVED): "saved to disk",
}


_PRESS_AGAIN_S = 4
_POWER_OFF = signal.SIGRTMIN + 4  # systemd(1): starts poweroff.target, whatever became of initctl's socket
# As libvirt writes `<uid start='0' target='100000' count='65536'/>` of <idmap>.
_ID_RANGE = re.compile(r"<[ug]id start='\d+' target='(\d+)' count='(\d+)'")


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One domain as the list gives it: its inactive XML (where our record is) and the live facts."""

    xml: str
    live: Live


def find(connection: Connection, name: str) -> libvirt.virDomain | None:
    """The domain of this name, or None."""
    try:
        return connection.handle.lookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise from_libvirt(error, f"cannot look up {name!r}") from error


def find_by_uuid(connection: Connection, uuid: UUID) -> libvirt.virDomain | None:
    """The domain of this UUID, or None."""
    try:
        return get(connection, uuid)
    except NotFound:
        return None


def get(connection: Connection, uuid: UUID) -> libvirt.virDomain:
    """The domain of this UUID. Raises NotFound."""
    with in_words(f"cannot find the domain {uuid}"):
        return connection.handle.lookupByUUIDString(str(uuid))


def list_all(connection: Connection) -> list[Listed]:
    """All domains of one driver, active or not, in no order. One that vanishes meanwhile is left out."""
    with in_words(f"cannot list the domains of {connection.uri}"):
        domains = connection.handle.listAllDomains()
    found = []
    for domain in domains:
        try:
            found.append(describe(domain))
        except NotFound:
            continue
    return found


def get_number(domain: libvirt.virDomain) -> int:
    """libvirt's number of a running domain; of a container, the process of its controller. Raises WrongState."""
    with in_words(f"cannot find the process of {domain.name()!r}"):
        number = domain.ID()
    if number <= 0:
        raise WrongState(f"{domain.name()!r} is not running", hint=f"hvctl start {domain.name()}")
    return int(number)


def get_name(domain: libvirt.virDomain) -> str:
    """The name that libvirt has for it now, whatever it was when it was looked up."""
    return ElementTree.fromstring(get_xml(domain)).findtext("name", "")


def list_id_ranges(connection: Connection) -> list[tuple[int, int]]:
    """The uids and gids (first, count) that all domains of one driver have or were promised, whoever made them."""
    with in_words(f"cannot list the domains of {connection.uri}"):
        listed = connection.handle.listAllDomains()
    found = []
    for domain in listed:
        try:
            xml = get_xml(domain)
        except NotFound:
            continue
        # By pattern: others wait meanwhile, and parsing all definitions of a busy host takes a second.
        found += [(int(first), int(count)) for first, count in _ID_RANGE.findall(xml)]
        found += [(first_id, 1) for first_id in metadata.find_first_ids(xml)]
    return found


def get_resident_bytes(domain: libvirt.virDomain) -> int:
    """Memory of the process that runs a VM (RSS), what it shares with others included; 0 when it is off."""
    with in_words(f"cannot measure the memory of {domain.name()!r}"):
        return int(domain.memoryStats().get("rss", 0)) * 1024 if domain.isActive() else 0


def get_used_bytes(domain: libvirt.virDomain) -> int:
    """Memory that libvirt counts as used by a running container; 0 when it is off."""
    with in_words(f"cannot measure the memory of {domain.name()!r}"):
        return int(domain.info()[2]) * 1024 if domain.isActive() else 0


def set_cpu_quota(domain: libvirt.virDomain, *, period_us: int, quota_us: int) -> None:
    """Let the running instance use this many microseconds of CPU in each period."""
    with in_words(f"cannot change the CPU quota of {domain.name()!r}"):
        quota = {"vcpu_period": period_us, "vcpu_quota": quota_us}
        domain.setSchedulerParametersFlags(quota, libvirt.VIR_DOMAIN_AFFECT_LIVE)


def set_memory_limit(domain: libvirt.virDomain, size_bytes: int) -> None:
    """Change what the running instance may use of the host's memory."""
    with in_words(f"cannot change the memory of {domain.name()!r}"):
        domain.setMemoryParameters({"hard_limit": size_bytes // 1024}, libvirt.VIR_DOMAIN_AFFECT_LIVE)


def describe(domain: libvirt.virDomain) -> Listed:
    """XML and live facts of one domain, in three round trips."""
    with in_words(f"cannot read the domain {domain.name()!r}"):
        xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        state, _maximum_kib, memory_kib, cpus, _time_ns = domain.info()
        cause = ""
        if state not in (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_NOSTATE):
            cause = _CAUSES.get((state, domain.state()[1]), "")
        # Of a container libvirt tells how much memory it uses now, and its CPUs are a quota.
        limits = _limits(xml)
        if _is_container(xml) and domain.ID() > 0:
            now = held.read_limits(domain.ID())  # the definition may be one for its next start
            limits = (now[0] or limits[0], now[1] or limits[1])
            if state == libvirt.VIR_DOMAIN_RUNNING and freezer.is_frozen(domain.ID()):
                state = libvirt.VIR_DOMAIN_PAUSED
        live = Live(
            state=_STATES.get(state, State.STOPPED),
            cause=cause,
            cpus=limits[0] or cpus,
            memory_bytes=limits[1] or memory_kib * 1024,
            is_autostart=bool(domain.autostart()),
        )
    return Listed(xml=xml, live=live)


def _is_container(xml: str) -> bool:
    """Whether a domain's number is the process of a controller."""
    return xml.startswith("<domain type='lxc'")


def _limits(xml: str) -> tuple[int, int]:
    """CPUs and bytes of memory that a definition limits its domain to by control groups; 0 where it does not."""
    if "<quota>" not in xml and "<hard_limit" not in xml:
        return 0, 0
    domain = ElementTree.fromstring(xml)
    quota, period = (int(domain.findtext(f"cputune/{name}", "0")) for name in ("quota", "period"))
    return (quota // period if period else 0), int(domain.findtext("memtune/hard_limit", "0")) * 1024


def get_xml(domain: libvirt.virDomain, *, inactive: bool = True) -> str:
    """The definition for the next start, or (not `inactive`) the one that runs."""
    with in_words(f"cannot read the definition of {domain.name()!r}"):
        return cast(str, domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE if inactive else 0))


def define(connection: Connection, xml: str, *, is_ours: bool = False) -> libvirt.virDomain:
    """Define or redefine a persistent domain. Raises InvalidSpec.

    After libvirt's own schema check, which costs 9 ms, unless nothing in its form is a user's (`is_ours`).
    """
    with in_words("cannot define the instance"):
        return connection.handle.defineXMLFlags(xml, 0 if is_ours else libvirt.VIR_DOMAIN_DEFINE_VALIDATE)


def set_metadata(domain: libvirt.virDomain, element: str, *, prefix: str, uri: str) -> None:
    """Write our element into the persistent definition, and into the running one where there is one."""
    with in_words(f"cannot write the record of {domain.name()!r}"):
        flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG
        if domain.isActive():
            flags |= libvirt.VIR_DOMAIN_AFFECT_LIVE
        domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, element, prefix, uri, flags)


def start(domain: libvirt.virDomain, *, paused: bool = False) -> None:
    with in_words(f"cannot start {domain.name()!r}"):
        domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED if paused else 0)


def kill(domain: libvirt.virDomain) -> None:
    """End the guest's process at once; fine when it is off already."""
    try:
        domain.destroy()
    except libvirt.libvirtError as error:
        if error.get_error_code() not in (libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_DOMAIN):
            raise from_libvirt(error, f"cannot end {domain.name()!r}") from error


def goes_off(domain: libvirt.virDomain, *, timeout_s: float) -> bool:
    """Whether a domain that is ending has ended within this time."""
    deadline_s = time.monotonic() + timeout_s
    while is_active(domain):
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(0.02)  # libvirt's event may have come before we could have asked for it
    return True


def pause(domain: libvirt.virDomain) -> None:
    with in_words(f"cannot pause {domain.name()!r}"):
        domain.suspend()


def resume(domain: libvirt.virDomain) -> None:
    with in_words(f"cannot resume {domain.name()!r}"):
        domain.resume()


def rename(domain: libvirt.virDomain, name: str) -> None:
    with in_words(f"cannot rename {domain.name()!r} to {name!r}"):
        domain.rename(name)


def set_autostart(domain: libvirt.virDomain, on: bool) -> None:
    with in_words(f"cannot change autostart of {domain.name()!r}"):
        domain.setAutostart(int(on))


def undefine(domain: libvirt.virDomain) -> None:
    """Remove the definition with everything libvirt keeps beside it (NVRAM, TPM state, managed save)."""
    flags = (
        libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
        | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
        | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
        | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
        | libvirt.VIR_DOMAIN_UNDEFINE_TPM
    )
    try:
        domain.undefineFlags(flags)
    except libvirt.libvirtError as error:
        code = error.get_error_code()
        if code == libvirt.VIR_ERR_NO_DOMAIN:
            return
        if code not in (libvirt.VIR_ERR_INVALID_ARG, libvirt.VIR_ERR_NO_SUPPORT):
            raise from_libvirt(error, f"cannot remove the definition of {domain.name()!r}") from error
        with in_words(f"cannot remove the definition of {domain.name()!r}"):  # libvirt-LXC knows none of the flags
            domain.undefine()


def set_vcpus(domain: libvirt.virDomain, count: int) -> None:
    """Change the number of CPUs of the running guest, up to the maximum it was started with."""
    with in_words(f"cannot change the CPUs of {domain.name()!r}"):
        domain.setVcpusFlags(count, libvirt.VIR_DOMAIN_AFFECT_LIVE)


def set_memory(domain: libvirt.virDomain, size_bytes: int) -> None:
    """Change the memory of the running guest by its balloon."""
    with in_words(f"cannot change the memory of {domain.name()!r}"):
        domain.setMemoryFlags(size_bytes // 1024, libvirt.VIR_DOMAIN_AFFECT_LIVE)


def is_active(domain: libvirt.virDomain) -> bool:
    with in_words(f"cannot read the state of {domain.name()!r}"):
        return bool(domain.isActive())


def is_running(domain: libvirt.virDomain) -> bool:
    """Whether it is active and not paused."""
    with in_words(f"cannot read the state of {domain.name()!r}"):
        return bool(domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING)


def console_log_path(xml: str) -> str:
    """The file that libvirt copies the serial console to, or empty."""
    node = ElementTree.fromstring(xml).find("./devices/serial/log")
    return node.get("file", "") if node is not None else ""


def ask_to_stop(domain: libvirt.virDomain) -> None:
    """Press the power button of a VM; tell a container's first process."""
    with in_words(f"cannot shut down {domain.name()!r}"):
        domain.shutdown()


def terminate(domain: libvirt.virDomain) -> None:
    """Send SIGTERM to a container's first process.

    libvirt 9.0's own shutdown looks for initctl's FIFO, reports success where there is none, and sends nothing (seen by strace).
    """
    with in_words(f"cannot shut down {domain.name()!r}"):
        domain.sendProcessSignal(1, libvirt.VIR_DOMAIN_PROCESS_SIGNAL_TERM, 0)


def shut_down(connection: Connection, domain: libvirt.virDomain, *, timeout_s: float, ask: Callable[[], None]) -> None:
    """Ask the guest to power off, by `ask`, and return when it is off, told by libvirt's event.

    Raises TimedOut, the guest untouched.
    """
    stopped = threading.Event()
    name = domain.name()

    def on_lifecycle(_connection: object, _domain: object, event: int, _detail: int, _opaque: object) -> None:
        if event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
            stopped.set()

    events = {libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE: on_lifecycle}
    with in_words(f"cannot shut down {name!r}"), connection.watching(domain, events):
        ask()
        _wait_for_event(stopped, domain, timeout_s, ask)


def _wait_for_event(
    stopped: threading.Event, domain: libvirt.virDomain, timeout_s: float, ask: Callable[[], None]
) -> None:
    """Wait in slices: each asks libvirt too, so that a lost connection is an error and not a silence.

    A guest that is still booting does not hear its power button: it is pressed again every few seconds.
    """
    deadline_s = time.monotonic() + timeout_s
    pressed_s = time.monotonic()
    while not stopped.wait(min(1.0, max(0.0, deadline_s - time.monotonic()))):
        if not domain.isActive():
            return
        if time.monotonic() >= deadline_s:
            raise TimedOut(f"{domain.name()!r} did not shut down within {timeout_s:g} s and is still running")
        if time.monotonic() - pressed_s >= _PRESS_AGAIN_S:
            pressed_s = time.monotonic()
            # It may go off this very moment, and only a container's first process can be sent a signal.
            for press in (lambda: domain.sendProcessSignal(1, _POWER_OFF, 0), ask):
                with contextlib.suppress(libvirt.libvirtError, HvctlError):
                    press()
