"""What the root of a container can do to the commands that are run in it, or for it, from outside."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import termios
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hvctl.config import Config
from hvctl.host import Host
from hvctl.hostside import enter, groups
from hvctl.instances import create, lifecycle, query
from hvctl.libvirtapi import domains, networks
from hvctl.model import Instance, Mode, Mount, Spec, Wait
from hvctl.units import MIB
from tests.cli import environment, run, wait_for

pytestmark = [pytest.mark.guest, pytest.mark.only_mode(Mode.CONTAINER, "its processes are the host's")]
HVCTL = (sys.executable, "-m", "hvctl")
_KEYCTL, _ADD_KEY, _JOIN, _SESSION = 250, 248, 1, -3  # x86_64; keyctl(2), add_key(2)
_LOOK_FOR_KEY = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print(libc.syscall(250, 10, -3, b"user", b"hvctl-test", 0), ctypes.get_errno())
"""
# Where the systemd inside makes its control groups, which are its root's.
_OWN_GROUPS = """
import os
lines = [line.rstrip("\\n").split(":", 2) for line in open("/proc/1/cgroup", errors="surrogateescape")]
(path,) = [path for _number, names, path in lines if names == "name=systemd"] or [lines[-1][2]]
tree = "/sys/fs/cgroup/systemd" if os.path.isdir("/sys/fs/cgroup/systemd") else "/sys/fs/cgroup"
own = tree + path.removesuffix("/init.scope")
"""
_GO_DEEP = f"""{_OWN_GROUPS}
for folder in ("/root", own):
    os.chdir(folder)
    for level in range(2500):
        try:
            os.mkdir("d")
            os.chdir("d")
        except OSError:
            break
"""
# A mount, and a control group of its first process, whose names are no text.
_NAME_BADLY = f"""{_OWN_GROUPS}
name = b"a\\xff\\xe2\\x80\\xa8b c"
os.chdir("/mnt")
os.mkdir(name)
assert os.system(b"mount -t tmpfs none '" + name + b"'") == 0
group = os.fsencode(own) + b"/" + name
os.mkdir(group)
open(group + b"/cgroup.procs", "w").write("1")
assert b"b c" in open("/proc/1/cgroup", "rb").read()
"""


@pytest.fixture(scope="module")
def watched(host: Host, debian_image: str) -> Iterator[Instance]:
    spec = Spec(name="watched", mode=Mode.CONTAINER, image=debian_image, memory_bytes=256 * MIB)
    yield create.create(host, create.Request(spec=spec, wait=Wait.SSH))
    lifecycle.delete(host, "watched")


@pytest.fixture
def controller(host: Host, watched: Instance) -> int:
    return domains.get_number(domains.get(host.connection(Mode.CONTAINER), watched.record.uuid))


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """A terminal, raw: the side of whoever sits there, and the other."""
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


def all_said(terminal: tuple[int, int]) -> bytes:
    """What was written to it, to the end: its other side is taken from it, as the last that is open."""
    ours, theirs = terminal
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), theirs)
    said = b""
    with contextlib.suppress(OSError):  # EIO: the end
        while data := os.read(ours, 4096):
            said += data
    return said


@pytest.mark.parametrize("number", [0, 1, 2])
def test_no_terminal_of_the_hosts_goes_inside(
    settings: Config, watched: Instance, terminal: tuple[int, int], tmp_path: Path, number: int
) -> None:
    """A command could go on reading it when somebody else types a password there."""
    ours, theirs = terminal
    plain = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in ("in", "out", "err")]
    script = f"readlink /proc/self/fd/{number} >&{1 if number == 0 else number}; echo told >&2; cat; exit 3"
    if number == 0:
        cooked = termios.tcgetattr(theirs)
        cooked[3] |= termios.ICANON  # ^D is the end
        termios.tcsetattr(theirs, termios.TCSANOW, cooked)
    streams = [theirs if stream == number else plain[stream] for stream in range(3)]
    os.write(plain[0], b"from a file")
    os.lseek(plain[0], 0, os.SEEK_SET)
    words = [*HVCTL, "exec", "watched", "--", "sh", "-c", script]
    process = subprocess.Popen(words, env=environment(settings), stdin=streams[0], stdout=streams[1], stderr=streams[2])
    if number == 0:
        os.write(ours, b"from a person\n\x04")
    assert process.wait(timeout=60) == 3
    said = all_said(terminal) if number else (tmp_path / "out").read_bytes()
    assert b"pipe:" in said, said
    expected = {0: (b"from a person", b"told"), 1: (b"from a file", b"told"), 2: (b"from a file", b"told")}[number]
    everything = said + (tmp_path / "out").read_bytes() + (tmp_path / "err").read_bytes()
    assert all(word in everything for word in expected), everything


def test_two_streams_to_one_terminal_keep_their_order(
    settings: Config, watched: Instance, terminal: tuple[int, int]
) -> None:
    script = "for n in 1 2 3 4 5; do echo $n; echo $n >&2; done"
    words = [*HVCTL, "exec", "watched", "--", "sh", "-c", script]
    streams = {"stdin": subprocess.DEVNULL, "stdout": terminal[1], "stderr": terminal[1]}
    subprocess.run(words, env=environment(settings), check=True, timeout=60, **streams)
    assert all_said(terminal).split() == b"1 1 2 2 3 3 4 4 5 5".split()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_stream_that_is_closed_is_no_file_of_ours(settings: Config, watched: Instance, number: int) -> None:
    close = f"exec {number}{'<' if number == 0 else '>'}&-"
    look = f"import os; os.write({2 if number == 1 else 1}, os.readlink(b'/proc/self/fd/{number}'))"
    line = f'{close}; "$@" -m hvctl exec watched -- python3 -c "{look}"'
    done = subprocess.run(
        ["sh", "-c", line, "sh", sys.executable],
        env=environment(settings),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.stdout + done.stderr == b"/dev/null"


def test_keys_of_the_callers_session_stay_outside(settings: Config, watched: Instance) -> None:
    def join_and_add() -> None:
        libc: Any = ctypes.CDLL(None)
        assert libc.syscall(_KEYCTL, _JOIN, None) >= 0
        assert libc.syscall(_ADD_KEY, b"user", b"hvctl-test", b"secret", 6, _SESSION) > 0

    for words, is_seen in (([sys.executable], True), ([*HVCTL, "exec", "watched", "--", "python3"], False)):
        done = subprocess.run(
            [*words, "-c", _LOOK_FOR_KEY], env=environment(settings), capture_output=True, text=True,
            preexec_fn=join_and_add, timeout=60, check=False,
        )  # fmt: skip
        number = int(done.stdout.split()[0])
        assert (number > 0) is is_seen, done


def test_what_is_asked_for_us_ends_and_stays_small(watched: Instance, controller: int) -> None:
    with pytest.raises(OSError, match="more than 1000 bytes"):
        enter.capture(controller, ["cat", "/dev/zero"], enter_path(), b"", limit_bytes=1000)
    with pytest.raises(TimeoutError):
        enter.capture(controller, ["sleep", "1001"], enter_path(), b"", timeout_s=0.5)
    seen = enter.capture(controller, ["cat"], enter_path(), b"all of it\n" * 100_000)
    assert seen == (0, b"all of it\n" * 100_000, b"")

    def running() -> bytes:
        return enter.capture(controller, ["ps", "-eo", "args="], enter_path(), b"")[1]

    wait_for(lambda: b"sleep 1001" not in running())
    assert b"sleep 1001" not in running()
    assert b"/dev/zero" not in running()


def enter_path() -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin"}


def test_the_log_of_a_paused_one_is_not_waited_for(settings: Config, watched: Instance) -> None:
    assert run(settings, "pause", "watched").status == 0
    try:
        assert run(settings, "logs", "watched").status == 0
    finally:
        run(settings, "resume", "watched")


def test_a_lease_is_given_to_a_mac_and_to_no_other_name(host: Host, settings: Config, watched: Instance) -> None:
    """The filter knows a guest's MAC alone: by the identifier of another's client a lease could be given back."""
    network = networks.get(host.connection(Mode.VM), settings.network)
    (lease,) = [lease for lease in network.DHCPLeases() if lease["ipaddr"] == watched.record.address]
    assert (lease["mac"], lease["clientid"]) == (watched.record.mac, None)


def test_a_log_cannot_speak_to_the_terminal(settings: Config, watched: Instance, terminal: tuple[int, int]) -> None:
    fake = "printf '#!/bin/sh\\nprintf \"\\033]0;title\\007\\033[2Jhidden\\\\n\"\\n' > /usr/local/bin/journalctl"
    assert (
        run(settings, "exec", "watched", "--", "sh", "-c", f"{fake}; chmod 755 /usr/local/bin/journalctl").status == 0
    )
    subprocess.run([*HVCTL, "logs", "watched"], env=environment(settings), stdout=terminal[1], check=True, timeout=60)
    run(settings, "exec", "watched", "--", "rm", "/usr/local/bin/journalctl")
    assert all_said(terminal).strip() == b"hidden"


def test_names_that_are_no_text_are_nobodys_trouble(host: Host, settings: Config, watched: Instance) -> None:
    named = run(settings, "exec", "watched", "--", "python3", "-c", _NAME_BADLY)
    assert named.status == 0, named
    assert run(settings, "list").status == 0
    assert run(settings, "exec", "watched", "--", "true").status == 0
    added = run(settings, "disk", "add", "watched", "data", "--size", "10MiB", "--target", "/srv/data")
    assert added.status == 0, added
    assert run(settings, "disk", "remove", "watched", "data", "--yes").status == 0
    assert run(settings, "stop", "watched", "--force").status == 0
    assert run(settings, "start", "watched").status == 0


def test_no_link_leads_a_mount_out_of_it(host: Host, settings: Config, debian_image: str, tmp_path: Path) -> None:
    """libvirt mounts by path while the host's root is still there: links that are in the way are put aside."""
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    shared = [tmp_path / name for name in ("outer", "shown", "hosts")]
    for folder in shared:
        folder.mkdir()
        folder.chmod(0o777)
    (shared[2] / "secret").touch()
    mounts = tuple(
        Mount(source=str(source), target=target, uid=0, gid=0)
        for source, target in zip(shared, ("/srv/a", "/srv/b"), strict=False)
    )
    spec = Spec(name="linked", mode=Mode.CONTAINER, image=debian_image, memory_bytes=256 * MIB, mounts=mounts)
    record = create.create(host, create.Request(spec=spec, wait=Wait.SSH)).record
    own = host.store.instance(record.uuid)
    # The first link leads the first mount over the source of the second, and the last one what is always there.
    script = f"""
    mkdir -p /srv/a{own}/mounts && ln -s /.oldroot{shared[2]} /srv/a{own}/mounts/1 || exit 1
    umount /srv/a /etc/hvctl/identity && rmdir /srv/a && ln -s /.oldroot/ /srv/a || exit 1
    rm -r /etc/hvctl && ln -s /.oldroot{shared[2]} /etc/hvctl || exit 1
    umount -R -l /sys; rm -r --one-file-system /sys && ln -s /etc /sys || exit 2
    """
    assert run(settings, "exec", "linked", "--", "sh", "-c", script).status == 0
    taken = run(settings, "snapshot", "take", "linked", "kept")
    assert (taken.status, taken.err) == (0, "")
    assert run(settings, "stop", "--force", "linked").status == 0
    started = run(settings, "start", "linked")
    assert started.status == 0, started
    seen = run(settings, "exec", "linked", "--", "sh", "-c", "ls /srv/a /srv/b; ls -d /srv/*; ls /etc/hvctl /sys").out
    assert "secret" not in seen
    assert "/srv/a.aside" in seen
    assert {"identity", "kernel"} <= set(seen.split())
    assert [path.name for path in shared[2].iterdir()] == ["secret"]
    lifecycle.delete(host, "linked")


def test_directories_of_any_depth_are_cleared_away(host: Host, settings: Config, debian_image: str) -> None:
    spec = Spec(name="deep", mode=Mode.CONTAINER, image=debian_image, memory_bytes=256 * MIB)
    record = create.create(host, create.Request(spec=spec, wait=Wait.SSH)).record
    assert run(settings, "exec", "deep", "--", "python3", "-c", _GO_DEEP).status == 0
    assert run(settings, "usage", "deep").status == 0
    refused = run(settings, "snapshot", "take", "deep", "kept")
    assert (refused.status, refused.err.count("\n")) in ((0, 0), (8, 1)), refused
    assert run(settings, "stop", "deep", "--force").status == 0
    for tree in set(groups.find_hierarchies().values()):
        assert not Path(groups.find_own(tree, str(record.uuid))).exists()
    assert run(settings, "start", "deep").status == 0
    deleted = run(settings, "delete", "--yes", "deep")
    assert (deleted.status, deleted.err) == (0, "")
    assert query.find(host, "deep") is None
