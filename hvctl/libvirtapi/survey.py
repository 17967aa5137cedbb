"""What libvirt says of itself and its host: versions, the user that QEMU runs as, networks. Reads only."""

from __future__ import annotations

from ipaddress import IPv4Network
from xml.etree import ElementTree

from hvctl.libvirtapi import networks
from hvctl.libvirtapi.connection import Connection
from hvctl.libvirtapi.faults import in_words
from hvctl.values import dataclass


@dataclass(frozen=True, kw_only=True)
class NetworkFacts:
    """One libvirt network: its bridge and its IPv4 subnets."""

    name: str
    is_active: bool
    is_autostart: bool
    bridge: str
    subnets: tuple[IPv4Network, ...]
    has_dhcp: bool
    is_routed: bool
    """Whether guests reach the world through it: `<forward>` is there."""


def find_network(connection: Connection, name: str) -> NetworkFacts | None:
    """The network of this name, or None."""
    network = networks.find(connection, name)
    if network is None:
        return None
    with in_words(f"cannot read the network {name!r}"):
        root = ElementTree.fromstring(network.XMLDesc())
        is_active, is_autostart = bool(network.isActive()), bool(network.autostart())
    bridge = root.find("bridge")
    return NetworkFacts(
        name=name,
        is_active=is_active,
        is_autostart=is_autostart,
        bridge=bridge.get("name", "") if bridge is not None else "",
        subnets=_subnets(root),
        has_dhcp=root.find("ip/dhcp") is not None,
        is_routed=root.find("forward") is not None,
    )


def list_subnets(connection: Connection) -> list[IPv4Network]:
    """The IPv4 subnets of all libvirt networks, active or not."""
    with in_words("cannot list the networks"):
        definitions = [ElementTree.fromstring(network.XMLDesc()) for network in connection.handle.listAllNetworks()]
    return [subnet for definition in definitions for subnet in _subnets(definition)]


def find_guest_owner(connection: Connection) -> tuple[int, int] | None:
    """uid and gid that guests' processes run as by default, or None where libvirt does not change the user.

    From the `dac` security model's base label in the capabilities, which is what qemu.conf came to.
    """
    with in_words(f"cannot read the capabilities of {connection.uri}"):
        capabilities = ElementTree.fromstring(connection.handle.getCapabilities())
    for model in capabilities.iterfind("host/secmodel"):
        label = model.findtext("baselabel", "")
        if model.findtext("model") == "dac" and label:
            uid, _, gid = label.partition(":")
            return int(uid.lstrip("+")), int(gid.lstrip("+"))
    return None


def _subnets(definition: ElementTree.Element) -> tuple[IPv4Network, ...]:
    return tuple(_subnet(node) for node in definition.iterfind("ip") if node.get("family", "ipv4") == "ipv4")


def _subnet(node: ElementTree.Element) -> IPv4Network:
    mask = node.get("prefix") or node.get("netmask") or "32"
    return IPv4Network(f"{node.get('address', '0.0.0.0')}/{mask}", strict=False)


def has_active_domain(connection: Connection) -> bool:
    """Whether any domain, anybody's, runs under this driver."""
    with in_words(f"cannot count the domains of {connection.uri}"):
        return bool(connection.handle.numOfDomains() > 0)


def look_at_qemu(connection: Connection) -> None:
    """Let libvirt learn what this host's QEMU can do; it keeps the answer until QEMU or the kernel changes."""
    with in_words("libvirt cannot find out what QEMU can do"):
        connection.handle.getDomainCapabilities(None, "x86_64", None, "qemu", 0)
