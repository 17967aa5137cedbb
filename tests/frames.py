"""Ethernet frames, right and forged, and a small lab to send them in: a bridge with ports, in its own namespaces."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

BROADCAST = "ff:ff:ff:ff:ff:ff"
NOBODY = "52:00:00:00:00:ff"  # a bridge sends to all ports what is for somebody it does not know
_HEADER_BYTES = 14
_QUIET_S = 2.0

# Run inside a port's far end: one sends frames given as hex; one prints those that arrive, until that which is to be the last
# has, or its input has ended and then nothing more comes.
_SENDER = """
import socket, sys
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as out:
    out.bind(("guest", 0))
    for line in sys.argv[1:]:
        out.send(bytes.fromhex(line))
"""
_LISTENER = """
import json, select, socket, sys
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as in_:
    in_.bind(("guest", 3))
    print("ready", flush=True)
    seen, watched, quiet_s = [], [in_, sys.stdin], None
    while not seen or seen[-1] != sys.argv[2]:
        ready, _, _ = select.select(watched, [], [], quiet_s)
        if in_ in ready:
            data, (_port, _protocol, kind, *_rest) = in_.recvfrom(2048)
            if kind != socket.PACKET_OUTGOING:
                seen.append(data.hex())
        elif ready:
            watched, quiet_s = [in_], float(sys.argv[1])
        else:
            break
    print(json.dumps(seen))
"""

_SERVER = """
import socket
with socket.create_server(("", 7)) as server:
    print("ready", flush=True)
    print(server.accept()[1][0])
"""
_CLIENT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 7), timeout=1).close()
except OSError:
    sys.exit(1)
"""


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def ethernet(source: str, kind: int, content: bytes, target: str = BROADCAST) -> bytes:
    """A whole frame, padded to the 60 bytes that a network card would pad it to."""
    return (mac_bytes(target) + mac_bytes(source) + struct.pack("!H", kind) + content).ljust(60, b"\0")


def arp(source: str, sender_mac: str, sender: str, target: str, *, is_reply: bool = False) -> bytes:
    content = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 2 if is_reply else 1)
    content += mac_bytes(sender_mac) + socket.inet_aton(sender) + bytes(6) + socket.inet_aton(target)
    return ethernet(source, 0x0806, content)


def udp(
    source: str, from_: str, to: str, from_port: int, to_port: int, content: bytes = b"enough to need no padding"
) -> bytes:
    segment = struct.pack("!HHHH", from_port, to_port, 8 + len(content), 0) + content
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), 1, 0, 64, socket.IPPROTO_UDP, 0)
    head += socket.inet_aton(from_) + socket.inet_aton(to)
    target = BROADCAST if to == "255.255.255.255" else NOBODY
    return ethernet(source, 0x0800, head[:10] + struct.pack("!H", checksum(head)) + head[12:] + segment, target)


def first_fragment(frame: bytes, content_bytes: int) -> bytes:
    """The first part of an IPv4 frame, cut after so many bytes of its UDP segment (RFC 791): more is to come."""
    head, segment = frame[14:34], frame[34 : 34 + content_bytes]
    head = head[:2] + struct.pack("!HHH", 20 + len(segment), 1, 0x2000) + head[8:10] + bytes(2) + head[12:]
    return frame[:14] + head[:10] + struct.pack("!H", checksum(head)) + head[12:] + segment


def dhcp(client: str, *, is_reply: bool = False) -> bytes:
    """A BOOTP message (RFC 951) with the magic cookie and no options but the end."""
    head = struct.pack("!BBBBIHH", 2 if is_reply else 1, 1, 6, 0, 1, 0, 0) + bytes(16)
    return head + mac_bytes(client).ljust(16, b"\0") + bytes(192) + b"\x63\x82\x53\x63\xff"


def router_advertisement(source: str) -> bytes:
    message = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0)
    sender = bytes.fromhex("fe80000000000000500000fffe0000aa")
    everybody = bytes.fromhex("ff020000000000000000000000000001")
    pseudo = sender + everybody + struct.pack("!II", len(message), 58)
    message = message[:2] + struct.pack("!H", checksum(pseudo + message)) + message[4:]
    return ethernet(source, 0x86DD, struct.pack("!IHBB", 6 << 28, len(message), 58, 255) + sender + everybody + message)


def tagged(frame: bytes) -> bytes:
    """The same frame in VLAN 5."""
    return frame[:12] + struct.pack("!HH", 0x8100, 5) + frame[12:]


def untagged(frame: bytes) -> bytes:
    return frame[:12] + frame[16:] if frame[12:14] == b"\x81\x00" else frame


def spanning_tree(source: str) -> bytes:
    return ethernet(source, 38, b"\x42\x42\x03" + bytes(35), "01:80:c2:00:00:00")


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data[: len(data) // 2 * 2])) + (
        data[-1] << 8 if len(data) % 2 else 0
    )
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@dataclass(frozen=True)
class Lab:
    """A namespace with a bridge; behind each of its ports another one, in which the far end is named `guest`."""

    name: str

    def load(self, commands: str) -> None:
        """Give commands to nft beside the bridge."""
        run("ip", "netns", "exec", self.name, "nft", "-f", "-", text=commands)

    def address(self, port: str, far: str, near: str) -> None:
        """Take a port off the bridge and make this namespace the router of its far end."""
        run("ip", "-n", self.name, "link", "set", port, "nomaster")
        run("ip", "-n", self.name, "address", "add", near, "dev", port)
        run("ip", "-n", f"{self.name}-{port}", "address", "add", far, "dev", "guest")
        run("ip", "-n", f"{self.name}-{port}", "route", "add", "default", "via", near.partition("/")[0])
        run("ip", "netns", "exec", self.name, "sysctl", "-qw", "net.ipv4.ip_forward=1")

    def ask(self, from_: str, address: str, at: str) -> str:
        """Who a connection from behind one port is from, seen behind the other; empty when it is not made."""
        with subprocess.Popen(inside(f"{self.name}-{at}", _SERVER), stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            connect = inside(f"{self.name}-{from_}", _CLIENT, address)
            if subprocess.run(connect, timeout=30, check=False).returncode != 0:
                server.terminate()
            return server.stdout.readline().strip()

    def arrives(self, from_: str, frame: bytes, at: str) -> bool:
        return frame in self.received(from_, [frame], at)

    def received(self, from_: str, sent: list[bytes], at: str) -> list[bytes]:
        """Those of the frames, sent in this order from behind one port, that come out behind the other.

        Listens until the last one has come, or all are sent and nothing has come for two seconds after that.
        """
        listen = inside(f"{self.name}-{at}", _LISTENER, str(_QUIET_S), untagged(sent[-1]).hex())
        with subprocess.Popen(listen, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as listener:
            assert listener.stdin is not None and listener.stdout is not None
            assert listener.stdout.readline() == "ready\n"
            run(*inside(f"{self.name}-{from_}", _SENDER, *(frame.hex() for frame in sent)))
            listener.stdin.close()
            seen = {bytes.fromhex(line) for line in json.loads(listener.stdout.readline())}
        return [frame for frame in sent if untagged(frame) in seen]  # the kernel hands the tag over beside the frame


@contextlib.contextmanager
def lab(name: str, ports: tuple[str, ...]) -> Iterator[Lab]:
    """Build one, and take it down at the end. Needs root."""
    spaces = (name, *(f"{name}-{port}" for port in ports))
    with contextlib.ExitStack() as undo:
        for space in spaces:
            run("ip", "netns", "add", space)
            undo.callback(run, "ip", "netns", "delete", space)
            # No router solicitations and no neighbour discovery of our own between the frames.
            run("ip", "netns", "exec", space, "sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
        run("ip", "-n", name, "link", "add", "br0", "type", "bridge", "stp_state", "0", "forward_delay", "0")
        run("ip", "-n", name, "link", "set", "br0", "up")
        for port in ports:
            far = f"{name}-{port}"
            run("ip", "-n", name, "link", "add", port, "type", "veth", "peer", "name", "guest", "netns", far)
            run("ip", "-n", name, "link", "set", port, "master", "br0", "up")
            run("ip", "-n", far, "link", "set", "guest", "up")
        yield Lab(name)


def inside(space: str, program: str, *words: str) -> list[str]:
    return ["ip", "netns", "exec", space, sys.executable, "-c", program, *words]


def run(*words: str, text: str = "") -> None:
    subprocess.run(words, input=text, text=True, check=True, timeout=30)
