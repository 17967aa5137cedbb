"""The hvctl network, and what the host does with its packets."""

from __future__ import annotations

import json
from ipaddress import IPv4Network
from pathlib import Path

from hvctl.doctor.finding import Outcome, check, failed, not_applicable, ok, warning
from hvctl.host import Host
from hvctl.hostside import machine
from hvctl.libvirtapi import survey
from hvctl.model import Mode
from hvctl.values import dataclass

SETTINGS = Path("/proc/sys/net")


@dataclass(frozen=True, kw_only=True)
class Route:
    """One IPv4 route of the host."""

    subnet: IPv4Network
    device: str


@check("network", is_vital=True, needs_libvirt=True)
def network(host: Host) -> Outcome:
    """The network that guests are plugged into is defined and active."""
    found = _find(host)
    if found is None:
        return failed(f"libvirt has no network {host.config.network!r}", fix="hvctl host setup")
    if not found.is_active:
        return failed(f"the network {found.name!r} is not active", fix="hvctl host setup")
    known = f"{found.name!r} on bridge {found.bridge!r} with {', '.join(map(str, found.subnets)) or 'no subnet'}"
    if not found.is_autostart:
        return warning(f"{known}, but it does not start at boot", fix=f"virsh net-autostart {found.name}")
    return ok(known)


@check("subnet", needs_libvirt=True)
def subnet(host: Host) -> Outcome:
    """No route of the host leads elsewhere for the addresses of guests."""
    found = _find(host)
    if found is None:
        return not_applicable(f"there is no network {host.config.network!r} yet")
    words = ["ip", "-json", "-4", "route", "show", "table", "all"]
    routes = parse_routes(host.shell.run(words, timeout_s=10).text)
    return judge_routes(found, routes)


def parse_routes(text: str) -> tuple[Route, ...]:
    """The routes in `ip -json -4 route show`, default routes and the kernel's local and broadcast ones left out."""
    routes = []
    for entry in json.loads(text or "[]"):
        target, device = entry.get("dst", "default"), entry.get("dev", "")
        if target != "default" and entry.get("type", "unicast") == "unicast" and device:
            routes.append(Route(subnet=IPv4Network(target, strict=False), device=device))
    return tuple(routes)


def judge_routes(found: survey.NetworkFacts, routes: tuple[Route, ...]) -> Outcome:
    """Whether one of the routes takes addresses of the network elsewhere."""
    for mine in found.subnets:
        for route in routes:
            if route.device != found.bridge and route.subnet.overlaps(mine) and route.subnet.prefixlen > 0:
                return failed(
                    f"{mine} of the network {found.name!r} clashes with the host's route to {route.subnet} "
                    f"by {route.device!r}",
                    fix="hvctl host teardown && hvctl host setup (it takes a free subnet)",
                )
    return ok(f"{', '.join(map(str, found.subnets))} is nobody else's among {len(routes)} routes")


@check("dnsmasq", is_vital=True)
def dnsmasq(host: Host) -> Outcome:
    """libvirt can give out addresses: its networks need dnsmasq. And they are given back."""
    path = host.shell.call(machine.find_program, ("dnsmasq", "/usr/sbin/dnsmasq"))
    if not path:
        return failed("'dnsmasq' is not installed on this host", fix="apt-get install dnsmasq-base")
    if not host.shell.call(machine.find_program, ("dhcp_release",)):
        return warning(
            "'dhcp_release' is not installed: dnsmasq keeps the leases of deleted instances for five minutes",
            fix="apt-get install dnsmasq-utils",
        )
    return ok(path)


@check("ssh", is_vital=True)
def ssh(host: Host) -> Outcome:
    """Instances get their host keys from ssh-keygen."""
    path = host.shell.call(machine.find_program, ("ssh-keygen",))
    return ok(path) if path else failed("'ssh-keygen' is not installed", fix="apt-get install openssh-client")


@check("forwarding", needs_libvirt=True)
def forwarding(host: Host) -> Outcome:
    """The host passes guests' packets on."""
    found = _find(host)
    if found is None or not found.is_active or not found.is_routed:
        return not_applicable("no network is active that would need it")
    if (host.shell.call(machine.find_text, SETTINGS / "ipv4/ip_forward") or "").strip() != "1":
        return warning("net.ipv4.ip_forward is off: guests reach only this host", fix="sysctl -w net.ipv4.ip_forward=1")
    return ok("net.ipv4.ip_forward is on")


@check("firewall")
def firewall(host: Host) -> Outcome:
    """The tools for guests' filters are there, and traffic on the bridge is not sent through the host's own rules."""
    if not host.shell.call(machine.find_program, ("nft", "/usr/sbin/nft")):
        return failed("'nft' is not installed: guests could pretend to be others", fix="apt-get install nftables")
    setting = host.shell.call(machine.find_text, SETTINGS / "bridge/bridge-nf-call-iptables")
    if (setting or "").strip() == "1":
        return warning(
            "net.bridge.bridge-nf-call-iptables is on (Docker does that): the host's firewall may drop what guests "
            "say to each other",
            fix="sysctl -w net.bridge.bridge-nf-call-iptables=0",
        )
    return ok("nft is there; frames on bridges do not pass the host's IP rules")


def _find(host: Host) -> survey.NetworkFacts | None:
    return survey.find_network(host.connection(Mode.VM), host.config.network)
