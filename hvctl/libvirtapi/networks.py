"""libvirt networks: definition, and the addresses that dnsmasq keeps for each MAC."""

from __future__ import annotations

import ipaddress
from xml.etree import ElementTree

import libvirt

from hvctl.errors import HostError, NotFound
from hvctl.libvirtapi.connection import Connection
from hvctl.libvirtapi.faults import from_libvirt, in_words
from hvctl.values import dataclass

# Short, because an address whose guest was killed is of no use to anybody until its lease has ended.
LEASE_MINUTES = "5"


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """An address that is kept for one MAC; guests find it in DNS by its name once it has its lease."""

    mac: str
    name: str
    address: str


def find(connection: Connection, name: str) -> libvirt.virNetwork | None:
    """The network of this name, or None."""
    try:
        return connection.handle.networkLookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_NETWORK:
            return None
        raise from_libvirt(error, f"cannot look up the network {name!r}") from error


def get(connection: Connection, name: str) -> libvirt.virNetwork:
    """The network of this name. Raises NotFound."""
    network = find(connection, name)
    if network is None:
        raise NotFound(f"there is no network {name!r}", hint="make it: hvctl host setup")
    return network


def ensure_active(connection: Connection, name: str) -> None:
    """Start the network if it is down. Raises HostError with libvirt's reason (a subnet that is taken, say)."""
    network = get(connection, name)
    with in_words(f"cannot start the network {name!r}"):
        if not network.isActive():
            network.create()


def read_definition(connection: Connection, name: str) -> str:
    """The network's XML as of its next start. Raises NotFound."""
    with in_words(f"cannot read the network {name!r}"):
        return str(get(connection, name).XMLDesc(libvirt.VIR_NETWORK_XML_INACTIVE))


def define(connection: Connection, xml: str) -> None:
    """Define a network from its XML; it is not started."""
    with in_words("cannot define the network"):
        connection.handle.networkDefineXML(xml)


def undefine(connection: Connection, name: str) -> None:
    """Stop a network and remove its definition; fine when it is gone."""
    network = find(connection, name)
    if network is None:
        return
    with in_words(f"cannot remove the network {name!r}"):
        if network.isActive():
            network.destroy()
        network.undefine()


def set_autostart(connection: Connection, name: str) -> None:
    """Let libvirt start the network at boot."""
    with in_words(f"cannot change the network {name!r}"):
        get(connection, name).setAutostart(1)


def get_subnet(connection: Connection, name: str) -> tuple[str, int]:
    """A network's gateway, which is its name server too, and the length of its prefix. Raises NotFound, HostError."""
    ip = _definition(get(connection, name)).find("./ip[@address]")
    if ip is None:
        raise HostError(f"the network {name!r} has no IPv4 address", hint="hvctl host doctor")
    gateway = ip.attrib["address"]
    mask = ip.get("prefix") or ip.get("netmask", "24")
    return gateway, ipaddress.IPv4Network(f"{gateway}/{mask}", strict=False).prefixlen


def list_reservations(connection: Connection, name: str) -> tuple[Reservation, ...]:
    """All reservations of a network."""
    return _reservations(_definition(get(connection, name)))


def reserve(
    connection: Connection,
    network: str,
    *,
    name: str,
    mac: str,
    address: str = "",
    after: str = "",
    asks_for_lease: bool = True,
) -> str:
    """Keep an address for this MAC, from this moment on: the one given, or the next free one `after` another.

    DNS knows the name once the guest has its lease; of one that does not ask for any, from now on.

    Going round the range, an address comes back long after its last lease has ended. libvirt's list of leases alone
    does not tell: each change of a reservation makes dnsmasq report every lease anew, one process each, and after a
    hundred changes that list is a minute behind (libvirt 9.0, a slow machine).

    Idempotent for a MAC that has one already. Raises HostError when the range is used up. The caller holds the
    network's lock; libvirt itself refuses a MAC or address that is taken.
    """
    handle = get(connection, network)
    definition = _definition(handle)
    known = _reservations(definition)
    for reservation in known:
        if reservation.mac == mac:
            _answer_with(handle, definition, reservation.address, "" if asks_for_lease else name)
            return reservation.address
    taken = {reservation.address for reservation in known} | _leased(handle)
    chosen = address or _next_free(definition, network, taken, after)
    _update(handle, libvirt.VIR_NETWORK_UPDATE_COMMAND_ADD_LAST, Reservation(mac=mac, name=name, address=chosen))
    _answer_with(handle, definition, chosen, "" if asks_for_lease else name)
    return chosen


def is_free(connection: Connection, network: str, address: str) -> bool:
    """Whether an address is one of the network's that nobody has. The caller holds the network's lock."""
    handle = get(connection, network)
    definition = _definition(handle)
    taken = {reservation.address for reservation in _reservations(definition)} | _leased(handle)
    return address in _list_range(definition) and address not in taken


def release(connection: Connection, network: str, *, mac: str) -> tuple[str, str]:
    """Give back what was kept for this MAC; fine when nothing was, or the network is gone.

    Returns the bridge and the address, which dnsmasq may still have lent out; empty when nothing was kept.
    """
    handle = find(connection, network)
    if handle is None:
        return "", ""
    definition = _definition(handle)
    for reservation in _reservations(definition):
        if reservation.mac == mac:
            _answer_with(handle, definition, reservation.address, "")
            _update(handle, libvirt.VIR_NETWORK_UPDATE_COMMAND_DELETE, reservation)
            bridge = definition.find("./bridge[@name]")
            return "" if bridge is None else bridge.attrib["name"], reservation.address
    return "", ""


def rename_reservation(
    connection: Connection, network: str, *, mac: str, name: str, asks_for_lease: bool = True
) -> None:
    """Give the reservation of this MAC another name. Raises NotFound when there is none."""
    handle = get(connection, network)
    definition = _definition(handle)
    for reservation in _reservations(definition):
        if reservation.mac == mac:
            _answer_with(handle, definition, reservation.address, "" if asks_for_lease else name)
            if reservation.name != name:
                renamed = Reservation(mac=mac, name=name, address=reservation.address)
                _update(handle, libvirt.VIR_NETWORK_UPDATE_COMMAND_MODIFY, renamed)
            return
    raise NotFound(f"the network {network!r} keeps no address for {mac}", hint="hvctl host doctor")


def _definition(network: libvirt.virNetwork) -> ElementTree.Element:
    with in_words(f"cannot read the network {network.name()!r}"):
        return ElementTree.fromstring(network.XMLDesc())


def _reservations(definition: ElementTree.Element) -> tuple[Reservation, ...]:
    return tuple(
        Reservation(mac=host.get("mac", ""), name=host.get("name", ""), address=host.get("ip", ""))
        for host in definition.iterfind("./ip/dhcp/host")
    )


def _leased(network: libvirt.virNetwork) -> set[str]:
    """Addresses that dnsmasq has lent out. It would not give one of them to another MAC before the lease ends."""
    with in_words(f"cannot read the leases of the network {network.name()!r}"):
        return {lease["ipaddr"] for lease in network.DHCPLeases()} if network.isActive() else set()


def _next_free(definition: ElementTree.Element, network: str, taken: set[str], after: str) -> str:
    numbers = [int(ipaddress.IPv4Address(address)) for address in _list_range(definition)]
    start = int(ipaddress.IPv4Address(after)) if after else 0
    for number in sorted(numbers, key=lambda number: (number <= start, number)):
        address = str(ipaddress.IPv4Address(number))
        if address not in taken:
            return address
    raise HostError(f"the network {network!r} has no free address left", hint="delete instances, or see: hvctl gc")


def _list_range(definition: ElementTree.Element) -> list[str]:
    """The addresses that a network gives."""
    found: list[str] = []
    for range_ in definition.iterfind("./ip/dhcp/range"):
        first, last = (int(ipaddress.IPv4Address(range_.attrib[end])) for end in ("start", "end"))
        found += [str(ipaddress.IPv4Address(number)) for number in range(first, last + 1)]
    return found


def _answer_with(network: libvirt.virNetwork, definition: ElementTree.Element, address: str, name: str) -> None:
    """Let DNS know an address by this name whoever has it; by none where that is empty."""
    known = definition.findtext(f"./dns/host[@ip='{address}']/hostname", "")
    changes = ((libvirt.VIR_NETWORK_UPDATE_COMMAND_DELETE, known), (libvirt.VIR_NETWORK_UPDATE_COMMAND_ADD_LAST, name))
    for command, hostname in changes if known != name else ():
        if hostname:
            element = ElementTree.Element("host", {"ip": address})
            ElementTree.SubElement(element, "hostname").text = hostname
            _change(network, command, libvirt.VIR_NETWORK_SECTION_DNS_HOST, element)


def _update(network: libvirt.virNetwork, command: int, reservation: Reservation) -> None:
    element = ElementTree.Element("host", {"mac": reservation.mac, "name": reservation.name, "ip": reservation.address})
    ElementTree.SubElement(element, "lease", {"expiry": LEASE_MINUTES, "unit": "minutes"})
    _change(network, command, libvirt.VIR_NETWORK_SECTION_IP_DHCP_HOST, element)


def _change(network: libvirt.virNetwork, command: int, section: int, element: ElementTree.Element) -> None:
    flags = libvirt.VIR_NETWORK_UPDATE_AFFECT_CONFIG
    with in_words(f"cannot change the addresses of the network {network.name()!r}"):
        if network.isActive():
            flags |= libvirt.VIR_NETWORK_UPDATE_AFFECT_LIVE
        text = ElementTree.tostring(element, encoding="unicode")
        network.update(command, section, -1, text, flags)
