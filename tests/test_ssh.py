"""ssh against a real OpenSSH server on loopback: pinned keys, bytes, arguments, exit codes, terminals."""

from __future__ import annotations

import hashlib
import os
import pty
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hvctl.access import banner, keys, ssh
from hvctl.access.banner import Reach
from hvctl.errors import GuestFailed, HostError, TimedOut
from hvctl.model import Endpoint
from tests import ports
from tests.cli import wait_for
from tests.payloads import PAYLOADS, aim

pytestmark = [pytest.mark.guest, pytest.mark.apart]  # needs openssh-server and root, which scripts/test has


class Server:
    """An sshd of the test's own."""

    def __init__(self, folder: Path, more: str = "") -> None:
        """`more`: further lines of its configuration."""
        folder.mkdir()
        pair = keys.new_pair()
        (folder / "host_key").write_bytes(pair.private)
        (folder / "host_key").chmod(0o600)
        (folder / "authorized_keys").write_text(keys.ensure_own_key() + "\n")
        self.log = folder / "log"
        Path("/run/sshd").mkdir(exist_ok=True)
        with ports.kept() as self.port:
            (folder / "config").write_text(
                f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nPidFile none\nUsePAM no\n"
                f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nPermitRootLogin yes\nLogLevel VERBOSE\n{more}"
            )
            sshd = shutil.which("sshd") or "/usr/sbin/sshd"
            self.process = subprocess.Popen([sshd, "-D", "-f", str(folder / "config"), "-E", str(self.log)])
            self.endpoint = Endpoint(
                instance="x", address="127.0.0.1", port=self.port, user="root", host_key=pair.public
            )
            wait_for(lambda: banner.probe(self.endpoint) is Reach.BANNER or self.process.poll() is not None)
            assert self.process.poll() is None, self.log.read_text()

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=10)


@pytest.fixture(scope="module")
def server(users_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that knows hvctl's own key."""
    started = Server(tmp_path_factory.mktemp("ssh") / "one")
    yield started
    started.close()


def client(endpoint: Endpoint, *words: str) -> list[str]:
    """The command that runs our client in a process of its own."""
    code = "import sys; from hvctl.access import ssh; from hvctl.model import Endpoint\n"
    return [sys.executable, "-c", f"{code}sys.exit(ssh.run({endpoint!r}, sys.argv[1:]))", *words]


def run(endpoint: Endpoint, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """The client in a process of its own, with pipes."""
    return subprocess.run(client(endpoint, *words), input=stdin, capture_output=True, timeout=60, check=False)


def test_the_pinned_key_is_taken(server: Server) -> None:
    done = run(server.endpoint, "echo out; echo err >&2")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"out\n", b"err\n")


def test_another_key_is_refused_before_anything_is_sent(server: Server, tmp_path: Path) -> None:
    """Two servers, one address: who has the other's key sees neither a user name nor a key of ours."""
    other = Server(tmp_path / "two")
    try:
        with pytest.raises(HostError, match="is not the one that hvctl made"):
            ssh.run(replace(server.endpoint, port=other.port), ["true"])
        assert "Accepted" not in other.log.read_text()
        assert "publickey" not in other.log.read_text()
    finally:
        other.close()


def test_ten_megabytes_come_back_unchanged(server: Server) -> None:
    noise = secrets.token_bytes(10_000_000)
    assert hashlib.sha256(run(server.endpoint, "cat", stdin=noise).stdout).digest() == hashlib.sha256(noise).digest()


@pytest.mark.parametrize(("line", "status"), [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -9 $$", 255)])
def test_the_commands_own_exit_status_comes_back(server: Server, line: str, status: int) -> None:
    assert run(server.endpoint, line).returncode == status


def test_one_word_is_a_shell_line_and_several_are_kept(server: Server) -> None:
    assert run(server.endpoint, "echo $((6 * 7)); echo two").stdout == b"42\ntwo\n"
    assert run(server.endpoint, "printf", "[%s]", "$((6 * 7))", "a b", "").stdout == b"[$((6 * 7))][a b][]"


@pytest.mark.parametrize("payload", [payload for payload in PAYLOADS if "\0" not in payload])
def test_arguments_arrive_as_they_are(server: Server, tmp_path: Path, payload: str) -> None:
    canary = tmp_path / "canary"
    text = aim(payload, canary)
    assert run(server.endpoint, "printf", "%s|", text, "é").stdout.decode() == f"{text}|é|"
    assert not canary.exists()


def test_a_reader_that_goes_away_ends_it(server: Server) -> None:
    process = subprocess.Popen(client(server.endpoint, "yes"), stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(timeout=30) == 141


def test_a_server_that_says_nothing_is_given_up(users_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hvctl import sshclient

    monkeypatch.setattr(sshclient, "_HANDSHAKE_TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        endpoint = Endpoint(instance="x", address="127.0.0.1", port=mute.getsockname()[1], host_key="ssh-ed25519 AAAA")
        with pytest.raises(TimedOut, match="does not finish its handshake"):
            ssh.run(endpoint, ["true"])
        assert banner.probe(endpoint) is Reach.SILENT


def test_a_closed_port_is_told(users_home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = Endpoint(instance="x", address="127.0.0.1", port=taken.getsockname()[1], host_key="ssh-ed25519 AAAA")
        with pytest.raises(GuestFailed, match="does not answer"):
            ssh.run(endpoint, ["true"])
        assert banner.probe(endpoint) is Reach.REFUSED


def test_a_server_that_knows_no_key_of_ours_is_told(server: Server) -> None:
    with pytest.raises(GuestFailed, match="accepts none of your"):
        ssh.run(replace(server.endpoint, user="nobody"), ["true"])


def test_a_terminal_is_raw_resized_and_restored(server: Server) -> None:
    """A shell in a real terminal: its size and later size are the shell's, and afterwards it is as it was."""
    master, slave = pty.openpty()
    set_size(slave, 24, 80)
    before = subprocess.run(["stty", "-g"], stdin=slave, capture_output=True, timeout=10, check=True).stdout
    process = subprocess.Popen(
        client(server.endpoint), stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    screen = Screen(master)
    os.write(master, b"PS1='ready''> '; stty size\r")
    screen.wait_for("24 80")
    set_size(slave, 30, 100)
    for _drag in range(3000):  # a dragged window's burst, which once found the connection's locks taken by itself
        process.send_signal(signal.SIGWINCH)
    deadline_s = time.monotonic() + 20
    while "30 100" not in screen.text and time.monotonic() < deadline_s:
        os.write(master, b"stty size\r")
        time.sleep(0.2)
    assert "30 100" in screen.text
    os.write(master, b"exit 5\r")
    assert process.wait(timeout=30) == 5
    after = subprocess.run(["stty", "-g"], stdin=slave, capture_output=True, timeout=10, check=True).stdout
    assert after == before
    os.close(slave)


def set_size(terminal: int, lines: int, columns: int) -> None:
    subprocess.run(["stty", "rows", str(lines), "cols", str(columns)], stdin=terminal, timeout=10, check=True)


class Screen:
    """What a terminal has shown so far, read by a thread."""

    def __init__(self, master: int) -> None:
        self.text = ""
        self._master = master
        threading.Thread(target=self._read, daemon=True).start()

    def wait_for(self, text: str) -> None:
        deadline_s = time.monotonic() + 20
        while text not in self.text and time.monotonic() < deadline_s:
            time.sleep(0.02)
        assert text in self.text

    def _read(self) -> None:
        while True:
            try:
                self.text += os.read(self._master, 4096).decode(errors="replace")
            except OSError:
                return
