"""The packet filter: guests cannot pretend to be another, and reach the world through the host's address.

Two nftables tables, each written whole in one transaction, so that there is never half a filter:

- `bridge hvctl`: frames that enter a bridge from a guest's interface must carry that guest's MAC and IPv4 address. Two
  sets hold who may say what; an instance is an element in each. Some 7 ms for one `nft`; libvirt's own clean-traffic
  filter costs 1.3 s a start.
- `ip hvctl`: masquerading for the networks of hvctl. libvirt would do that too (`<forward mode="nat">`), but then
  rewrites its whole firewall at every change of a reservation: 470 ms instead of 2 ms (libvirt 9.0).

hvctl's networks are IPv4; IPv6 from guests is dropped.
"""

from __future__ import annotations

import ipaddress
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

NETWORKS = Path("/usr/local/lib/hvctl/networks")
"""One JSON file for each network of hvctl on this host: what must be there again after a boot or a flush."""

_DEVICE = re.compile(r"hv[0-9a-f]{10}", re.ASCII)
_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}", re.ASCII)
_TIMEOUT_S = 10

_GUESTS = """
table bridge hvctl {
    set macs { type ifname . ether_addr; }
    set addresses { type ifname . ether_addr . ipv4_addr; }
    chain guests {
        type filter hook prerouting priority -300; policy accept;
        iifname != "hv*" accept
        iifname . ether saddr != @macs drop
        ether type arp goto arp_from_guest
        ether type ip goto ip_from_guest
        drop
    }
    chain arp_from_guest {
        iifname . arp saddr ether . arp saddr ip @addresses accept
        iifname . arp saddr ether @macs arp saddr ip 0.0.0.0 accept
        drop
    }
    chain ip_from_guest {
        ip saddr 0.0.0.0 udp sport 68 udp dport 67 accept
        udp sport 67 drop
        iifname . ether saddr . ip saddr @addresses accept
        drop
    }
}
"""


@dataclass(frozen=True)
class Guest:
    """A guest's interface on the host, and what may come out of it."""

    device: str
    mac: str
    address: str

    def __post_init__(self) -> None:
        ipaddress.IPv4Address(self.address)
        if not _DEVICE.fullmatch(self.device) or not _MAC.fullmatch(self.mac):
            raise ValueError(f"not a guest's interface: {self!r}")


def admit(guest: Guest) -> None:
    """Let this guest through the filter, which is made where it is missing; fine when it is let through already."""
    commands = [] if _has_table("bridge") else [_GUESTS]
    commands.append(f"add element bridge hvctl macs {{ {guest.device} . {guest.mac} }}")
    commands.append(f"add element bridge hvctl addresses {{ {guest.device} . {guest.mac} . {guest.address} }}")
    if not _has_table("ip"):
        commands.append(_masquerade())
    _nft(commands)


def dismiss(guest: Guest) -> None:
    """Take this guest out of the filter again; fine when it is not in."""
    if not _has_table("bridge"):
        return
    elements = (
        f"macs {{ {guest.device} . {guest.mac} }}",
        f"addresses {{ {guest.device} . {guest.mac} . {guest.address} }}",
    )
    # nft has no "delete if there": adding first makes the deletion always valid, in one transaction.
    _nft([f"{verb} element bridge hvctl {element}" for element in elements for verb in ("add", "delete")])


def restore() -> None:
    """Write the masquerading anew from the networks that are registered, and make the guests' table if it is missing."""
    commands = [] if _has_table("bridge") else [_GUESTS]
    commands.append(_masquerade())
    _nft(commands)


def remove() -> None:
    """Remove both tables."""
    _nft([f"{verb} table {family} hvctl" for family in ("bridge", "ip") for verb in ("add", "delete")])


def is_in_place() -> bool:
    """Whether both tables are there and every registered network is masqueraded."""
    done = _run(["nft", "list", "table", "ip", "hvctl"])
    return _has_table("bridge") and done.returncode == 0 and all(subnet in done.stdout for subnet in subnets())


def subnets() -> list[str]:
    """The subnets of the registered networks, sorted."""
    found = []
    for path in sorted(NETWORKS.glob("*.json")):
        found.append(str(ipaddress.IPv4Network(json.loads(path.read_text())["subnet"])))
    return sorted(found)


def _masquerade() -> str:
    rules = "\n".join(f"ip saddr {subnet} ip daddr != {subnet} masquerade" for subnet in subnets())
    return f"""
add table ip hvctl
delete table ip hvctl
table ip hvctl {{
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip daddr 224.0.0.0/4 return
        {rules}
    }}
}}
"""


def _has_table(family: str) -> bool:
    return _run(["nft", "list", "tables", family]).stdout.find(" hvctl") >= 0


def _nft(commands: list[str]) -> None:
    done = _run(["nft", "-f", "-"], "\n".join(commands))
    if done.returncode != 0:
        raise OSError(f"nft refused the filter: {done.stderr.strip()[:500]}")


def _run(argv: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, input=text, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
