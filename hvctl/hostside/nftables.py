"""`nft`, run, and the number that the kernel gives to each state of all rules.

Without `subprocess`, which costs every start of a guest 5 ms to import.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import sys

from hvctl.hostside.ending import ends_within

_TIMEOUT_S = 10
_SO_NETNS_COOKIE = 71  # <asm-generic/socket.h>
# <linux/netfilter/nfnetlink.h>, <linux/netfilter/nf_tables.h>
_NETLINK_NETFILTER, _NLM_F_REQUEST, _NFTA_GEN_ID = 12, 1, 1
_NEW_GENERATION, _GET_GENERATION = (
    (10 << 8) | 15,
    (10 << 8) | 16,
)  # NFNL_SUBSYS_NFTABLES; NFT_MSG_NEWGEN, NFT_MSG_GETGEN
_HEADERS = struct.Struct("=IHHII BBH")  # struct nlmsghdr, struct nfgenmsg


class Running:
    """`nft` that runs, given a text on its standard input."""

    def __init__(self, words: list[str], text: str = "") -> None:
        self._said = os.fdopen(os.memfd_create("said"), "w+")
        with os.fdopen(os.memfd_create("given"), "w+") as given:
            given.write(text)
            given.flush()
            os.lseek(given.fileno(), 0, os.SEEK_SET)
            streams = [given.fileno(), self._said.fileno(), self._said.fileno()]
            actions = [(os.POSIX_SPAWN_DUP2, stream, number) for number, stream in enumerate(streams)]
            self._process = os.posix_spawn(_find_program(), ["nft", *words], os.environ, file_actions=actions)

    def wait(self) -> tuple[int, str]:
        """Its exit status and all that it said, when it has ended. Raises TimeoutError when it had to be killed."""
        is_late = not ends_within(self._process, _TIMEOUT_S)
        if is_late:
            os.kill(self._process, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])
        with self._said:
            self._said.seek(0)
            said = self._said.read()
        if is_late:
            raise TimeoutError(f"nft did not end within {_TIMEOUT_S} s: {said[:500]}")
        return status, said


def run(words: list[str], text: str = "") -> tuple[int, str]:
    """The exit status of `nft`, and all that it said."""
    return Running(words, text).wait()


class Generation:
    """A state of all rules of one network namespace. `number` is one more at each change.

    `namespace`: neither its inode, which is given again, nor its number alone, which begins anew with each boot.
    """

    def __init__(self, namespace: str, number: int) -> None:
        self.namespace = namespace
        self.number = number

    def next(self) -> Generation:
        """After one more change."""
        return Generation(self.namespace, self.number + 1)

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other)

    def __str__(self) -> str:
        return f"{self.namespace} {self.number}"


def find_generation() -> Generation:
    """The present state of all rules of this host (of this network namespace). Raises OSError where the kernel has no
    nftables."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as channel:
        channel.settimeout(_TIMEOUT_S)
        channel.send(_HEADERS.pack(_HEADERS.size, _GET_GENERATION, _NLM_F_REQUEST, 1, 0, socket.AF_UNSPEC, 0, 0))
        answer = channel.recv(4096)
        namespace = _identify_namespace(channel)
    at = _HEADERS.size if answer[4:6] == _NEW_GENERATION.to_bytes(2, sys.byteorder) else len(answer)
    while at + 8 <= len(answer):  # attributes: length and kind of each, then its value (netlink(7))
        length, kind = struct.unpack_from("=HH", answer, at)
        if kind == _NFTA_GEN_ID:
            return Generation(namespace, *struct.unpack_from("!I", answer, at + 4))
        at += max(4, (length + 3) & ~3)
    raise OSError(errno.EPROTO, "the kernel does not tell the generation of nftables' rules")


def _identify_namespace(channel: socket.socket) -> str:
    """A channel's network namespace, among all there ever are on this machine; each time another where Linux (before 5.14)
    does not tell."""
    with open("/proc/sys/kernel/random/boot_id") as stream:
        boot = stream.read().strip()
    try:
        cookie = channel.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        cookie = os.urandom(8)
    return f"{boot} {cookie.hex()}"


def _find_program() -> str:
    """A hook's PATH is libvirtd's, which may lack sbin. Raises FileNotFoundError. (`shutil.which` costs 3 ms to import.)"""
    folders = [*os.environ.get("PATH", os.defpath).split(os.pathsep), "/usr/sbin", "/sbin"]
    for folder in folders:
        if os.access(f"{folder}/nft", os.X_OK):
            return f"{folder}/nft"
    raise FileNotFoundError(errno.ENOENT, "not installed", "nft")
