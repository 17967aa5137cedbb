"""What a confined program can see and do, tried from inside."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvctl.config import Config
from hvctl.errors import CommandFailed, HostError, InvalidSpec
from hvctl.host import Host
from hvctl.hostside import sandbox
from hvctl.rootfs import intake
from hvctl.rootfs.intake import Limits
from hvctl.shell import Completed
from hvctl.units import GIB, MIB
from tests.trees import fingerprint

pytestmark = [pytest.mark.guest, pytest.mark.apart]  # needs root, and bubblewrap

NAP_S = f"4{os.getpid()}"
CAPABILITIES = [(), sandbox.WRITE_ANY_OWNER]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(Config(store=tmp_path, run=tmp_path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    (tmp_path / "beside").write_text("untouched")
    return folder


def python(host: Host, folder: Path, program: str, capabilities: tuple[str, ...] = ()) -> object:
    """What a Python program prints as JSON inside."""
    argv = ["/usr/bin/python3", "-ISB", "-c", program]
    return json.loads(intake.run_confined(host, folder, argv, capabilities=capabilities).stdout)


ATTEMPTS = """
import ctypes, json, os, socket
libc = ctypes.CDLL(None, use_errno=True)
done = {}
def attempt(name, deed):
    try:
        result = deed()
        done[name] = result if result is not None else True
    except OSError as error:
        done[name] = False
attempt("connect", lambda: socket.create_connection(("127.0.0.1", PORT), timeout=2) and None)
attempt("abstract socket", lambda: socket.socket(socket.AF_UNIX).connect("\\0" + NAME))
attempt("write /usr", lambda: open("/usr/x", "w") and None)
attempt("write /", lambda: open("/x", "w") and None)
attempt("write /etc", lambda: open("/etc/x", "w") and None)
attempt("write input", lambda: open("/in/0", "r+") and None)
attempt("remount", lambda: check(libc.mount(None, b"/usr", None, 0x1020, None)))
attempt("mount", lambda: check(libc.mount(b"t", b"/work", b"tmpfs", 0, None)))
attempt("unshare user", lambda: check(libc.unshare(0x10000000)))
attempt("mknod", lambda: os.mknod("/work/node", 0o20666, os.makedev(1, 3)))
attempt("core_pattern", lambda: open("/proc/sys/kernel/core_pattern", "w") and None)
attempt("kill", lambda: os.kill(PID, 9))
attempt("bpf", lambda: check(libc.syscall(321, 0, None, 0)))
attempt("setuid shell keeps", lambda: check(libc.prctl(39, 0, 0, 0, 0) - 1))
def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
"""


@pytest.mark.parametrize("capabilities", CAPABILITIES, ids=["none", "writer"])
def test_it_can_do_nothing_outside(host: Host, folder: Path, tmp_path: Path, capabilities: tuple[str, ...]) -> None:
    program = ATTEMPTS.replace("libc = ", "PORT, NAME, PID = %r\nlibc = ", 1)
    definition = program[program.index("def check") :]
    program = program.replace(definition, "").replace("done = {}", definition + "done = {}") + "print(json.dumps(done))"
    victim = subprocess.Popen(["sleep", "60"])
    name = f"hvctl-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind("\0" + name)
        local.listen()
        program = program % ((server.getsockname()[1], name, victim.pid),)
        argv = ["/usr/bin/python3", "-ISB", "-c", program]
        done = intake.run_confined(host, folder, argv, capabilities=capabilities, read_only=[tmp_path / "beside"])
    found = json.loads(done.stdout)
    assert len(found) == 14
    expected = dict.fromkeys(found, False) | {"setuid shell keeps": True}
    if capabilities:
        del expected["unshare user"], found["unshare user"]  # there it gives nothing but a namespace of its own
    assert found == expected
    assert victim.poll() is None
    victim.kill()
    victim.wait()
    assert (tmp_path / "beside").read_text() == "untouched"


def test_it_sees_its_directory_and_the_system(host: Host, folder: Path) -> None:
    seen = python(
        host, folder, "import json, os; print(json.dumps([os.listdir('/'), os.listdir('/work'), dict(os.environ)]))"
    )
    assert isinstance(seen, list)
    assert set(seen[0]) <= {"usr", "lib", "lib64", "bin", "sbin", "etc", "dev", "work", "code"}
    assert seen[1] == ["mine"]
    assert set(seen[2]) <= {"PATH", "LC_ALL", "PWD"}
    assert python(host, folder, "import json, os; print(json.dumps(os.listdir('/etc')))") == ["ld.so.cache"]


def test_limits_hold_and_are_named(host: Host, folder: Path) -> None:
    def run(program: str, limits: Limits) -> Completed:
        return intake.run_confined(host, folder, ["/usr/bin/python3", "-ISB", "-c", program], limits=limits)

    with pytest.raises(InvalidSpec, match="CPU time"):
        run("while True: pass", Limits(cpu_s=1))
    with pytest.raises(InvalidSpec, match="a file of more than 1MiB"):
        run(
            "import signal; signal.signal(25, signal.SIG_DFL); open('x', 'wb').write(bytes(9 << 20))",
            Limits(file_bytes=MIB),
        )
    with pytest.raises(CommandFailed, match="MemoryError"):
        run("bytearray(1 << 30)", Limits(memory_bytes=512 * MIB))
    with pytest.raises(InvalidSpec, match="more than 1048576 bytes to say"):
        run("while True: print('error ' * 10000)", Limits(output_bytes=MIB))


def test_a_crash_is_the_inputs_fault(host: Host, folder: Path) -> None:
    with pytest.raises(InvalidSpec, match="crashed"):
        intake.run_confined(host, folder, ["/usr/bin/python3", "-ISB", "-c", "import os; os.abort()"])


def test_a_missing_program_is_the_hosts(host: Host, folder: Path) -> None:
    with pytest.raises(HostError, match="no-such-program"):
        intake.run_confined(host, folder, ["no-such-program"])


def test_it_dies_with_whoever_started_it(folder: Path) -> None:
    argv = sandbox.command(sandbox.Confinement(directory=folder), ["sleep", NAP_S])
    starter = subprocess.Popen([sys.executable, "-c", f"import subprocess; subprocess.run({argv!r})"])
    deadline_s = time.monotonic() + 30
    while not find_sleepers():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    while find_sleepers():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def find_sleepers() -> str:
    return subprocess.run(["pgrep", "-x", "-f", f"sleep {NAP_S}"], capture_output=True, text=True, timeout=30).stdout


def test_words_are_words_whatever_they_are(folder: Path) -> None:
    """Nothing of the program's own words is taken for an option of the sandbox."""
    argv = sandbox.command(sandbox.Confinement(directory=folder), ["echo", "--bind", "/", "/", "$(id)", "-x"])
    assert subprocess.run(argv, capture_output=True, text=True, timeout=30).stdout == "--bind / / $(id) -x\n"
    assert fingerprint(folder).keys() == {"mine"}
    assert sandbox.Confinement(directory=folder).file_bytes == 64 * GIB
