"""The packet filter: guests cannot pretend to be another, and reach the world through the host's address.

Two nftables tables, written whole in one transaction from two directories, so that there is never half a filter and
that a ruleset which somebody flushed is complete again at the next start of any guest:

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
import json
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from hvctl.hostside import locks

NETWORKS = Path("/usr/local/lib/hvctl/networks")
"""One JSON file for each network of hvctl on this host: what must be there again after a boot or a flush."""
GUESTS = Path("/run/hvctl-guests")
"""One file for each guest that runs, named after its interface: `MAC ADDRESS`. A boot empties it, as it does the host."""

_DEVICE = re.compile(r"hv[0-9a-f]{10}", re.ASCII)
_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}", re.ASCII)
_TIMEOUT_S = 10

# Only ARP and IPv4 pass, so that nothing hides in a tagged frame. An ARP probe (RFC 5227) has no sender address yet.
# `@th,288,48` is the client's MAC inside a DHCP message (RFC 2131, chaddr), for which nft has no word.
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
        udp dport 67 iifname . @th,288,48 != @clients drop
        iifname . ether saddr . ip saddr @addresses accept
        ip saddr 0.0.0.0 udp sport 68 udp dport 67 accept
        drop
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
    with _locked():
        (GUESTS / guest.device).write_text(f"{guest.mac} {guest.address}\n")
        with _start(["-f", "-"]) as process:
            assert process.stdin
            process.stdin.write(render(guests(), subnets()))
            process.stdin.close()
            process.stdin = None  # `communicate` would flush it
            yield
            _out, said = process.communicate(timeout=_TIMEOUT_S)  # not `wait`, which looks every few milliseconds
            _check(process.returncode, said)


def dismiss(guest: Guest) -> None:
    """Forget this guest; fine when it is not known."""
    with _locked():
        with contextlib.suppress(FileNotFoundError):
            (GUESTS / guest.device).unlink()
        _load()


def restore() -> None:
    """Write both tables anew from the networks and guests that are registered."""
    with _locked():
        _load()


def remove() -> None:
    """Remove both tables, and what is known of guests."""
    import shutil  # here: the hook has no use for it

    _nft("".join(f"add table {family} hvctl\ndelete table {family} hvctl\n" for family in ("bridge", "ip")))
    shutil.rmtree(GUESTS, ignore_errors=True)


def is_in_place() -> bool:
    """Whether both tables are there and every registered network is masqueraded."""
    done = _run(["list", "table", "ip", "hvctl"])
    has_bridge = _run(["list", "table", "bridge", "hvctl"]).returncode == 0
    return has_bridge and done.returncode == 0 and all(subnet in done.stdout for subnet in subnets())


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
    found = []
    for path in sorted(NETWORKS.glob("*.json")):
        found.append(str(ipaddress.IPv4Network(json.loads(path.read_text())["subnet"])))
    return sorted(found)


def render(guests: Iterable[Guest], subnets: Iterable[str]) -> str:
    """The commands for `nft -f` that put these tables in the place of the old ones."""
    guests = list(guests)
    rows = {
        "ports { type ifname;": [guest.device for guest in guests],
        "macs { type ifname . ether_addr;": [f"{guest.device} . {guest.mac}" for guest in guests],
        "addresses { type ifname . ether_addr . ipv4_addr;": [
            f"{guest.device} . {guest.mac} . {guest.address}" for guest in guests
        ],
        "clients { typeof iifname . @th,288,48;": [
            f"{guest.device} . 0x{guest.mac.replace(':', '')}" for guest in guests
        ],
    }
    sets = "".join(f"    set {head} {_elements(row)} }}\n" for head, row in rows.items())
    return _replace("bridge", sets + _FROM_GUESTS) + _replace("ip", _format_routing(subnets))


def _elements(row: list[str]) -> str:
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
    return locks.hold(GUESTS.with_suffix(".lock"), timeout_s=_TIMEOUT_S)


def _load() -> None:
    _nft(render(guests(), subnets()))


def _nft(commands: str) -> None:
    done = _run(["-f", "-"], commands)
    _check(done.returncode, done.stderr)


def _check(status: int, said: str) -> None:
    if status != 0:
        raise OSError(f"nft refused the filter: {said.strip()[:500]}")


def _run(words: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    with _start(words) as process:
        out, err = process.communicate(text, timeout=_TIMEOUT_S)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def _start(words: list[str]) -> subprocess.Popen[str]:
    # A hook's PATH is libvirtd's, which may lack sbin.
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"}
    pipe = subprocess.PIPE
    return subprocess.Popen(["nft", *words], stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
