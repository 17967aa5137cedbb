"""The network of hvctl's instances: a libvirt network with a subnet that nobody else uses here.

Its forward mode is `open`: libvirt runs the bridge and dnsmasq but no firewall, which is ours (hostside/filters.py has
the reason). No spanning tree: with it a port is silent for its first seconds.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from hvctl.errors import HostError
from hvctl.host import Host
from hvctl.hostsetup import daemons
from hvctl.hostsetup.change import Change
from hvctl.hostside import files, filters
from hvctl.libvirtapi import networks, survey
from hvctl.model import Mode

_PREFIX_LENGTH = 24
_TRIES = 200
_DNSMASQ = "{http://libvirt.org/schemas/network/dnsmasq/1.0}"  # https://libvirt.org/formatnetwork.html
_BY_MAC = "dhcp-ignore-clid"


def missing(host: Host) -> Iterator[Change]:
    name = host.config.network
    if not daemons.is_answering(host):  # in a dry run on a host without daemons
        yield Change(text=f"define the network {name!r}", apply=lambda: None)
        return
    connection = host.connection(Mode.VM)
    if networks.find(connection, name) is None:
        subnet = choose_subnet(host)
        xml = format_xml(name, subnet)
        text = f"define the network {name!r} with {subnet}"
        yield Change(text=text, apply=functools.partial(networks.define, connection, xml))
    network = survey.find_network(connection, name)
    if network is None:  # in a dry run
        return
    xml = networks.read_definition(connection, name)
    if _is_ours(name, xml) and not _goes_by_mac(xml):
        text = f"let leases of {name!r} go by the MAC alone, from its next start on"
        yield Change(text=text, apply=functools.partial(networks.define, connection, _go_by_mac(xml)))
    if not network.is_autostart:
        yield Change(
            text=f"let {name!r} start at boot", apply=functools.partial(networks.set_autostart, connection, name)
        )
    if not network.is_active:
        yield Change(
            text=f"start the network {name!r}", apply=functools.partial(networks.ensure_active, connection, name)
        )
    wanted = str(network.subnets[0])
    if not _file(name).exists() or json.loads(_file(name).read_text())["subnet"] != wanted or not filters.is_in_place():
        text = f"let guests of {wanted} out through this host's address, and nobody pretend to be another (nftables)"
        yield Change(text=text, apply=functools.partial(_register, name, wanted))
    if Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() != "1":
        yield Change(text="turn on net.ipv4.ip_forward", apply=_forward)


def present(host: Host) -> Iterator[Change]:
    name = host.config.network
    if daemons.is_answering(host) and networks.find(host.connection(Mode.VM), name) is not None:
        apply = functools.partial(networks.undefine, host.connection(Mode.VM), name)
        yield Change(text=f"remove the network {name!r}", apply=apply)
    if _file(name).exists():
        yield Change(
            text=f"forget the network {name!r} in the packet filter", apply=functools.partial(_unregister, name)
        )


def choose_subnet(host: Host) -> ipaddress.IPv4Network:
    """A random private /24 that overlaps no route, address or libvirt network of this host. Raises HostError."""
    taken = _routes(host) + survey.list_subnets(host.connection(Mode.VM))
    for _try in range(_TRIES):
        subnet = ipaddress.IPv4Network((f"10.{secrets.randbelow(256)}.{secrets.randbelow(256)}.0", _PREFIX_LENGTH))
        if not any(subnet.overlaps(other) for other in taken):
            return subnet
    raise HostError("there is no free subnet in 10.0.0.0/8", hint="define the network yourself: virsh net-define")


def format_xml(name: str, subnet: ipaddress.IPv4Network) -> str:
    """The network's definition: the first address is the host's, all others are lent out."""
    gateway, *_rest, last = subnet.hosts()
    top = Element("network")
    SubElement(top, "name").text = name
    SubElement(top, "forward", {"mode": "open"})
    SubElement(top, "bridge", {"name": bridge_name(name), "stp": "off", "delay": "0"})
    SubElement(top, "domain", {"name": f"{name}.internal", "localOnly": "yes"})
    ip = SubElement(top, "ip", {"address": str(gateway), "netmask": str(subnet.netmask)})
    range_ = SubElement(SubElement(ip, "dhcp"), "range", {"start": str(gateway + 1), "end": str(last)})
    SubElement(range_, "lease", {"expiry": networks.LEASE_MINUTES, "unit": "minutes"})
    return _go_by_mac(ElementTree.tostring(top, encoding="unicode"))


def _is_ours(name: str, xml: str) -> bool:
    return ElementTree.fromstring(xml).find(f"./bridge[@name='{bridge_name(name)}']") is not None


def _goes_by_mac(xml: str) -> bool:
    return ElementTree.fromstring(xml).find(f"./{_DNSMASQ}options/{_DNSMASQ}option[@value='{_BY_MAC}']") is not None


def _go_by_mac(xml: str) -> str:
    """Tell dnsmasq to look at a guest's MAC, which the filter knows, and not at the identifier that it may send along
    (RFC 2132, option 61): with another's it could give that one's lease away."""
    top = ElementTree.fromstring(xml)
    options = top.find(f"{_DNSMASQ}options")
    if options is None:
        options = SubElement(top, f"{_DNSMASQ}options")
    SubElement(options, f"{_DNSMASQ}option", {"value": _BY_MAC})
    return ElementTree.tostring(top, encoding="unicode")


def bridge_name(network: str) -> str:
    """The bridge's interface: never of a guest's pattern (`hv` and ten hex digits), at most 15 characters."""
    name = f"br-{network}"
    return name if len(name) <= 15 else f"br-{hashlib.sha256(network.encode()).hexdigest()[:12]}"


def _routes(host: Host) -> list[ipaddress.IPv4Network]:
    routes = json.loads(
        host.shell.run(["ip", "-json", "-4", "route", "show", "table", "all"], timeout_s=10).text or "[]"
    )
    found = []
    for route in routes:
        destination = route.get("dst", "default")
        if destination != "default" and route.get("type", "unicast") in ("unicast", "local"):
            found.append(ipaddress.IPv4Network(destination, strict=False))
    return found


def _file(name: str) -> Path:
    return filters.NETWORKS / f"{name}.json"


def _register(name: str, subnet: str) -> None:
    filters.NETWORKS.mkdir(parents=True, exist_ok=True)
    files.write_file(_file(name), json.dumps({"subnet": subnet}).encode(), 0o644)
    filters.restore()


def _unregister(name: str) -> None:
    files.remove(_file(name))
    if filters.list_networks():
        filters.restore()
    else:
        filters.remove()


def _forward() -> None:
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1\n")
    files.write_file(
        Path("/etc/sysctl.d/60-hvctl.conf"), b"# Made by `hvctl host setup`.\nnet.ipv4.ip_forward=1\n", 0o644
    )
