"""libvirt's daemons: do they answer, may this user ask them, are they what is installed?"""

from __future__ import annotations

import os
import re
from pathlib import Path

from hvctl.doctor.finding import Outcome, check, failed, not_applicable, ok, warning
from hvctl.errors import HostError, TimedOut
from hvctl.host import Host
from hvctl.hostside import daemons, files, machine
from hvctl.model import Mode

LIBVIRT = "libvirt"
SOCKETS = (Path("/run/libvirt/libvirt-sock"), Path("/run/libvirt/virtqemud-sock"))
LOG_SOCKET = Path("/run/libvirt/virtlogd-sock")
CONFIGURATION = Path("/etc/libvirt")
PROGRAMS = ("libvirtd", "/usr/sbin/libvirtd", "virtqemud", "/usr/sbin/virtqemud")


@check(LIBVIRT, is_vital=True)
def libvirt(host: Host) -> Outcome:
    """The QEMU driver answers, and it is the version that is installed."""
    program = host.shell.call(machine.find_program, PROGRAMS)
    if not program:
        return failed("libvirt's daemon is not installed on this host", fix="apt-get install libvirt-daemon-system")
    uri, running = host.config.vm_uri, _find_running(host, Mode.VM, program)
    installed = find_installed(host, program)
    if installed and installed != running:
        return warning(f"{uri} still runs version {running}, {installed} is installed", fix=_restart(host, program))
    return ok(f"{uri} answers, version {running}")


@check("libvirt for containers")
def libvirt_for_containers(host: Host) -> Outcome:
    """The LXC driver answers."""
    program = host.shell.call(machine.find_program, PROGRAMS)
    return ok(f"{host.config.container_uri} answers, version {_find_running(host, Mode.CONTAINER, program)}")


@check("lxcfs")
def lxcfs(host: Host) -> Outcome:
    """Containers are shown their own memory and CPUs; libvirt's own /proc/meminfo cannot seek before 11, `free` fails."""
    if not host.shell.call(daemons.has_lxcfs):
        return warning("`free` and `uptime` in containers tell of the host, or fail", fix="apt-get install lxcfs")
    if not host.shell.call(daemons.find_running, "lxcfs"):
        return ok("installed; it is started with the first container")
    return ok("containers see their own memory, CPUs and uptime")


@check("libvirt's socket")
def socket(host: Host) -> Outcome:
    """Who may speak to libvirt, which is as good as being root."""
    for path in SOCKETS:
        facts = host.shell.call(machine.describe_access, path)
        if facts is not None:
            return judge_socket(path, facts, _authorisation(host, path), is_root=os.geteuid() == 0)
    return not_applicable(f"no socket at {SOCKETS[0]}: libvirt is not running, or elsewhere")


def judge_socket(path: Path, facts: tuple[int, str, str], authorisation: str, *, is_root: bool) -> Outcome:
    """What mode, owner and group of the socket and `auth_unix_rw` come to."""
    mode, owner, group = facts
    known = f"{path} has mode {mode:04o} and belongs to {owner}:{group}, authorisation {authorisation!r}"
    if mode & 0o002 and authorisation == "none":
        return failed(
            f"{known}: every local user is as good as root",
            fix=f'set unix_sock_group = "libvirt" and unix_sock_rw_perms = "0770" in {CONFIGURATION}/libvirtd.conf, '
            "then restart libvirtd",
        )
    if not is_root and not os.access(path, os.W_OK):
        user = machine.find_user_name(os.geteuid()) or str(os.geteuid())
        return failed(f"{known}: this user may not use it", fix=f"usermod -aG {group} {user}, and log in again")
    if mode & 0o002:
        return ok(f"{known}: polkit decides for everybody but root")
    return ok(f"{known}: for {owner} and group {group}" if mode & 0o020 else f"{known}: for {owner} alone")


@check("virtlogd", is_vital=True)
def virtlogd(host: Host) -> Outcome:
    """The daemon that keeps consoles' logs answers; libvirt starts no VM without it."""
    settings = host.shell.call(machine.find_text, CONFIGURATION / "qemu.conf") if os.geteuid() == 0 else None
    if settings and re.search(r'^\s*stdio_handler\s*=\s*"file"', settings, re.MULTILINE):
        return not_applicable("qemu.conf says that libvirt writes logs itself")
    if os.geteuid() != 0:
        return not_applicable("only root may speak to it")
    try:
        host.shell.call(machine.connect, LOG_SOCKET)
    except HostError as error:
        return failed(f"{error.message}: it does not run", fix="hvctl host setup")
    return ok(f"{LOG_SOCKET} answers")


def _authorisation(host: Host, socket_path: Path) -> str:
    """`auth_unix_rw`, which is polkit where it is not set and libvirt was built with it, as distributions do."""
    name = "libvirtd.conf" if socket_path == SOCKETS[0] else "virtqemud.conf"
    text = host.shell.call(machine.find_text, CONFIGURATION / name) or ""
    found = re.search(r'^\s*auth_unix_rw\s*=\s*"(\w+)"', text, re.MULTILINE)
    return found.group(1) if found else "polkit"


def _restart(host: Host, program: str) -> str:
    name = Path(program).name
    has_systemd = host.shell.call(files.exists, Path("/run/systemd/system"))
    return f"systemctl restart {name}" if has_systemd else f"kill $(cat /run/{name}.pid) && hvctl host setup"


def _find_running(host: Host, mode: Mode, program: str) -> str:
    """The version that answers. Raises HvctlError with what mends it: a daemon that hangs is restarted."""
    try:
        return ".".join(str(number) for number in host.connection(mode).version())
    except TimedOut as error:
        raise TimedOut(error.message, hint=_restart(host, program)) from error
    except HostError as error:
        hint = "hvctl host setup" if "hvctl" in error.hint else error.hint
        # Without polkit libvirt lets in root alone, and says so in words about a bus.
        raise HostError(error.message, hint=hint if os.geteuid() == 0 else "run it as root") from error


def find_installed(host: Host, program: str) -> str:
    """The version of libvirt's daemon on the disk, or an empty string."""
    found = re.search(r"\d+\.\d+\.\d+", host.shell.run([program, "--version"], timeout_s=10).text)
    return found.group(0) if found else ""
