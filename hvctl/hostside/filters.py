"""The packet filter: guests cannot pretend to be another, and reach the world through the host's address.

Two nftables tables, written whole in one transaction from two directories, so that there is never half a filter and
that a ruleset which somebody flushed is complete again at the next start of any guest. Only where no rule of this host
has changed since our last change (the kernel counts), a guest that starts is just added:

- `bridge hvctl`: frames that enter a bridge from a guest's interface must carry that guest's MAC and IPv4 address.
  Interfaces that are nobody's here are not touched. Some 7 ms for one `nft`; libvirt's own clean-traffic filter costs
  1.3 s a start.
- `ip hvctl`: masquerading for the networks of hvctl, and nobody outside opens a connection into them. libvirt would do
  that too (`<forward mode="nat">`), but then rewrites its whole firewall at every change of a reservation: 470 ms
  instead of 2 ms (libvirt 9.0).

hvctl's networks are IPv4; IPv6 from guests is dropped.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from hvctl.hostside import locks, nftables

NETWORKS = Path("/usr/local/lib/hvctl/networks")
"""One JSON file for each network of hvctl on this host: what must be there again after a boot or a flush."""
GUESTS = Path("/run/hvctl-guests")
"""One file for each guest that runs, named after its interface: `MAC ADDRESS`. A boot empties it, as it does the host."""

_DEVICE = re.compile(r"hv[0-9a-f]{10}", re.ASCII)
_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}", re.ASCII)
_LOCK_TIMEOUT_S = 30
_SETS = {
    "ports": "type ifname",
    "macs": "type ifname . ether_addr",
    "addresses": "type ifname . ether_addr . ipv4_addr",
    "clients": "typeof iifname . @th,288,48",
}

# Only ARP and IPv4 pass, so that nothing hides in a tagged frame. An ARP probe (RFC 5227) has no sender address yet.
# `@th,288,48` is the client's MAC inside a DHCP message (RFC 2131, chaddr), for which nft has no word; a message in
# fragments (RFC 791: an offset, or more to come) need not have it in its first one.
_FROM_GUESTS = """
    chain from_guests {
        type filter hook prerouting priority -300; policy accept;
        iifname != @ports accept
        iifname . ether saddr != @macs drop
        ether type arp goto arp_from_guests
        ether type ip goto ip_from_guests
        drop
    }
    chain arp_from_guests {
        iifname . arp saddr ether . arp saddr ip @addresses accept
        arp operation request arp saddr ip 0.0.0.0 iifname . arp saddr ether @macs accept
        drop
    }
    chain ip_from_guests {
        udp sport 67 drop
        udp dport 67 jump dhcp_from_guests
        iifname . ether saddr . ip saddr @addresses accept
        ip saddr 0.0.0.0 udp sport 68 udp dport 67 accept
        drop
    }
    chain dhcp_from_guests {
        ip frag-off & 0x3fff != 0 drop
        iifname . @th,288,48 != @clients drop
    }
"""


class Guest:
    """A guest's interface on the host, and what may come out of it. Raises ValueError for what is none."""

    def __init__(self, device: str, mac: str, address: str) -> None:
        # These texts become commands of nft that root runs.
        ipaddress.IPv4Address(address)
        if not _DEVICE.fullmatch(device) or not _MAC.fullmatch(mac):
            raise ValueError(f"not a guest's interface: {device!r} {mac!r}")
        self.device = device
        self.mac = mac
        self.address = address


def admit(guest: Guest) -> None:
    """Let this guest speak as itself, and only so; fine when it may already."""
    with admitting(guest):
        pass


@contextlib.contextmanager
def admitting(guest: Guest) -> Iterator[None]:
    """`admit` beside the block, since the kernel takes its time with new tables; true when the block has ended."""
    path, entry = GUESTS / guest.device, f"{guest.mac} {guest.address}\n"
    with _locked():
        known = path.read_text() if path.exists() else ""
        seen = nftables.find_generation()  # once: what others change after that is never taken for ours
        is_complete = _is_as_left(seen)
        if is_complete and known == entry:
            yield
            return
        _forget()
        aside = GUESTS.with_suffix(".entry")
        aside.write_text(entry)
        aside.replace(path)  # never half an entry
        # An element is added in 5 ms. Tables that are replaced take 20, for the kernel waits until nobody reads them.
        is_added = is_complete and not known
        nft = nftables.Running(["-f", "-"], _add(guest) if is_added else _whole())
        try:
            yield
        finally:
            status, said = nft.wait()
        if is_added and status != 0:  # somebody has taken the tables away at this very moment
            _load()
            return
        _check(status, said)
        _note(seen)


def dismiss(guest: Guest) -> None:
    """Forget this guest; fine when it is not known."""
    with _locked():
        _forget()
        (GUESTS / guest.device).unlink(missing_ok=True)
        _load()


def restore() -> None:
    """Write both tables anew from the networks and guests that are registered."""
    with _locked():
        _load()


def remove() -> None:
    """Remove both tables, and what is known of guests."""
    import shutil  # here: the hook has no use for it

    tables = ("bridge hvctl", "ip hvctl")
    _check(*nftables.run(["-f", "-"], "".join(f"add table {table}\ndelete table {table}\n" for table in tables)))
    _forget()
    shutil.rmtree(GUESTS, ignore_errors=True)


def is_in_place() -> bool:
    """Whether both tables are there and every registered network is masqueraded."""
    has_bridge = nftables.run(["list", "table", "bridge", "hvctl"])[0] == 0
    status, said = nftables.run(["list", "table", "ip", "hvctl"])
    return has_bridge and status == 0 and all(subnet in said for subnet in subnets())


def guests() -> list[Guest]:
    """The guests that are registered, by interface."""
    found = []
    for name in sorted(os.listdir(GUESTS)) if GUESTS.is_dir() else []:
        found.append(Guest(name, *(GUESTS / name).read_text().split()))
    return found


def list_networks(*, but: str = "") -> list[str]:
    """Names of the networks that the filter serves, all `but` one."""
    return sorted(path.stem for path in NETWORKS.glob("*.json") if path.stem != but)


def subnets() -> list[str]:
    """The subnets of the registered networks, sorted."""
    import json  # here: a guest that is just added needs none

    return sorted(str(ipaddress.IPv4Network(json.loads(text)["subnet"])) for text in _networks())


def _networks() -> list[str]:
    return [path.read_text() for path in sorted(NETWORKS.glob("*.json"))]


def render(guests: Iterable[Guest], subnets: Iterable[str]) -> str:
    """The commands for `nft -f` that put these tables in the place of the old ones."""
    rows: dict[str, list[str]] = {name: [] for name in _SETS}
    for guest in guests:
        for name, element in _elements_of(guest).items():
            rows[name].append(element)
    sets = "".join(f"    set {name} {{ {_SETS[name]}; {_format_elements(row)} }}\n" for name, row in rows.items())
    return _replace("bridge", sets + _FROM_GUESTS) + _replace("ip", _format_routing(subnets))


def _whole() -> str:
    return render(guests(), subnets())


def _add(guest: Guest) -> str:
    """The commands that let one more guest speak, where the tables are complete."""
    return "".join(
        f"add element bridge hvctl {name} {{ {element} }}\n" for name, element in _elements_of(guest).items()
    )


def _elements_of(guest: Guest) -> dict[str, str]:
    """Set -> what stands in it for a guest."""
    return {
        "ports": guest.device,
        "macs": f"{guest.device} . {guest.mac}",
        "addresses": f"{guest.device} . {guest.mac} . {guest.address}",
        "clients": f"{guest.device} . 0x{guest.mac.replace(':', '')}",
    }


def _format_elements(row: list[str]) -> str:
    return f"elements = {{ {', '.join(row)} }};" if row else ""


def _format_routing(subnets: Iterable[str]) -> str:
    out, in_ = [], []
    for subnet in subnets:
        out.append(f"        ip saddr {subnet} ip daddr != {subnet} masquerade\n")
        # A peer on the host's network needs only a route to knock at every guest; a forwarded port is asked for.
        # Guests' own traffic comes by here as well where br_netfilter is on (Docker turns it on).
        in_.append(f"        ip daddr {subnet} ip saddr != {subnet} ct state new ct status != dnat drop\n")
    return f"""
    chain leaving {{
        type nat hook postrouting priority srcnat; policy accept;
        ip daddr 224.0.0.0/4 return
        ip daddr 255.255.255.255 return
{"".join(out)}    }}
    chain entering {{
        type filter hook forward priority filter; policy accept;
{"".join(in_)}    }}
"""


def _replace(family: str, content: str) -> str:
    """Adding first makes the deletion valid always; nft does all of it at once or nothing."""
    return f"add table {family} hvctl\ndelete table {family} hvctl\ntable {family} hvctl {{\n{content}}}\n"


def _locked() -> contextlib.AbstractContextManager[None]:
    """Two guests that start at once must not each load tables without the other."""
    GUESTS.mkdir(mode=0o755, exist_ok=True)
    return locks.hold(GUESTS.with_suffix(".lock"), timeout_s=_LOCK_TIMEOUT_S)


def _load() -> None:
    _forget()
    seen = nftables.find_generation()
    _check(*nftables.run(["-f", "-"], _whole()))
    _note(seen)


def _is_as_left(now: nftables.Generation) -> bool:
    """Whether nobody has changed any rule of this host since our last change: then our tables are complete."""
    path = _state_path()
    return path.exists() and path.read_text() == _state(now)


def _forget() -> None:
    """Before anything is changed: whoever comes after a crash writes all anew."""
    _state_path().unlink(missing_ok=True)


def _note(seen: nftables.Generation) -> None:
    """After one change that has succeeded: that this is how we left it, unless others have changed rules since `seen`."""
    now = nftables.find_generation()
    if now == seen.next():
        _state_path().write_text(_state(now))


def _state_path() -> Path:
    return GUESTS.with_suffix(".state")


def _state(generation: nftables.Generation) -> str:
    """What our last change left: which state of all rules, which of ours, and for which networks."""
    return "\n".join((str(generation), _FROM_GUESTS, *_networks()))


def _check(status: int, said: str) -> None:
    if status != 0:
        raise OSError(f"nft refused the filter: {said.strip()[:500]}")
