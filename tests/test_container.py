"""What only containers have: namespaces instead of a machine, a root that a hook mounts, limits by control groups."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import secrets
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvctl import gc
from hvctl.config import Config
from hvctl.errors import HostError
from hvctl.host import Host
from hvctl.hostside import enter, groups, ids
from hvctl.instances import change, create, lifecycle, query, usage
from hvctl.libvirtapi import domains
from hvctl.model import Instance, Mode, Mount, Record, Spec, State, Wait
from hvctl.units import MIB
from tests import tiny, victims, world
from tests.cli import environment, run, run_bytes, wait_for
from tests.scenarios import make_tiny_container

pytestmark = pytest.mark.guest


def container_only(reason: str) -> pytest.MarkDecorator:
    """The mark of a test that cannot be about VMs, with the reason."""
    return pytest.mark.only_mode(Mode.CONTAINER, reason)


def make(host: Host, name: str, image: str, **options: object) -> Instance:
    """A container that runs, its init at work; its own options go into the spec."""
    spec = Spec(name=name, mode=Mode.CONTAINER, image=image, **{"memory_bytes": 256 * MIB, **options})  # type: ignore[arg-type]
    return create.create(host, create.Request(spec=spec, wait=Wait.SSH))


def sh(settings: Config, name: str, script: str) -> str:
    """What a shell line inside says, on both streams."""
    done = run(settings, "exec", name, "--", "sh", "-c", script)
    return done.out + done.err


FORK_BOMB = "for n in $(seq 200); do sleep 60 > /dev/null 2>&1 & done"


def end_bomb(host: Host, instance: Instance) -> None:
    """From outside: no process more can be started inside."""
    init = groups.find_init(controller_of(host, instance.record))
    words = ["pkill", "-x", "sleep", "--ns", str(init), "--nslist", "pid"]
    wait_for(lambda: subprocess.run(words, check=False).returncode == 1)


def look(host: Host) -> world.World:
    """The world, without what the container that most tests share writes meanwhile."""
    boxed = query.find(host, "boxed")
    return world.look(host, alive=boxed.record if boxed else None)


def controller_of(host: Host, record: Record) -> int:
    return domains.get_number(domains.get(host.connection(Mode.CONTAINER), record.uuid))


@pytest.fixture(scope="module")
def boxed(host: Host, debian_image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """A container with every limit and a writable and a read-only directory of the host's."""
    shared = tmp_path_factory.mktemp("shared")
    for folder in (shared, *shared.parents[:2]):
        folder.chmod(0o755)
    for name in ("written", "read"):
        (shared / name).mkdir()
    os.chown(shared / "written", 4242, 4343)
    mounts = (
        Mount(source=str(shared / "written"), target="/data", uid=4242, gid=4343),
        Mount(source=str(shared / "read"), target="/read/only", is_read_only=True, uid=0, gid=0),
    )
    allowed = str(max(os.sched_getaffinity(0)))
    instance = make(host, "boxed", debian_image, cpus=1, cpuset=allowed, processes=64, mounts=mounts)
    yield instance
    lifecycle.delete(host, "boxed")


@container_only("control groups")
def test_what_it_is_told_of_its_size_is_what_it_was_given(settings: Config, boxed: Instance) -> None:
    assert sh(settings, "boxed", "nproc").strip() == "1"
    total_kib = int(sh(settings, "boxed", "free -k | awk '/Mem/ {print $2}'"))
    assert total_kib == 256 * 1024


@container_only("control groups")
def test_an_over_eater_is_killed_inside_and_the_rest_goes_on(settings: Config, boxed: Instance) -> None:
    eaten = run(settings, "exec", "boxed", "--", "sh", "-c", "head -c 600000000 /dev/zero | tail > /dev/null; echo $?")
    assert "137" in eaten.out, eaten
    assert sh(settings, "boxed", "systemctl is-active ssh").strip() == "active"


def _oom_score(process: int) -> int:
    return int(Path(f"/proc/{process}/oom_score_adj").read_text())


@container_only("control groups")
def test_what_is_inside_is_killed_before_what_holds_it(host: Host, settings: Config, boxed: Instance) -> None:
    """libvirt's controller and the parent of an `exec` are in the same group, and larger than many a process inside."""
    controller = domains.get_number(domains.get(host.connection(Mode.CONTAINER), boxed.record.uuid))
    init = groups.find_init(controller)
    words = [sys.executable, "-m", "hvctl", "exec", "boxed", "--", "sh", "-c", "echo begun; read end"]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=environment(settings), **streams) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "begun\n"
        holder = groups.find_init(process.pid)  # its only child
        command = groups.find_init(holder)
        likely = min(_oom_score(init), _oom_score(command))
        wait_for(lambda: _oom_score(holder) < likely)  # it is spared once the command has begun
        unlikely = max(_oom_score(controller), _oom_score(holder))
        process.communicate("end\n")
    assert unlikely < likely


@container_only("control groups")
def test_a_fork_bomb_stops_at_the_number_of_processes(host: Host, settings: Config, boxed: Instance) -> None:
    said = sh(settings, "boxed", FORK_BOMB)
    assert "Cannot fork" in said
    end_bomb(host, boxed)
    assert "ok" in sh(settings, "boxed", "echo ok")


@container_only("control groups")
def test_its_root_cannot_lift_a_limit(host: Host, settings: Config, boxed: Instance) -> None:
    """Written from inside wherever it is mounted, and afterwards the eater is killed and the bomb bounded as before."""
    lift = """
    for file in $(find /sys/fs/cgroup -name memory.limit_in_bytes -o -name memory.max -o -name pids.max -o -name cpu.max \
        -o -name cpu.cfs_quota_us); do
        echo max > $file; echo -1 > $file; echo 9999999999 > $file
    done 2> /dev/null
    head -c 600000000 /dev/zero | tail > /dev/null; echo $?
    """
    said = sh(settings, "boxed", lift + FORK_BOMB)
    end_bomb(host, boxed)
    assert "137" in said
    assert "Cannot fork" in said


@container_only("the kernel of the host is its own")
def test_what_is_the_hosts_cannot_be_reached_from_inside(
    host: Host, settings: Config, boxed: Instance, tmp_path: Path
) -> None:
    """THREATS: each attempt as the container's root; the canaries outside are what they were."""
    canary = tmp_path / "canary"
    canary.write_text("alive")
    victim = subprocess.Popen(["sleep", "600"])
    core_pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    try:
        attempts = {
            "core_pattern": "echo '|/bin/true' > /proc/sys/kernel/core_pattern",
            "core_pattern, remounted": "mount -o remount,rw /proc/sys && echo '|/bin/true' > /proc/sys/kernel/core_pattern",
            "a fresh proc": "mkdir -p /tmp/p && mount -t proc proc /tmp/p && echo '|/bin/true' > /tmp/p/sys/kernel/core_pattern",
            "cgroup mount": "mkdir -p /tmp/c && mount -t cgroup -o memory none /tmp/c && ls /tmp/c/release_agent",
            "release_agent": 'f=$(find /sys/fs/cgroup -name release_agent | head -1); [ -n "$f" ] && echo /bin/true > $f',
            "mknod": "mknod /tmp/disk b 254 0",
            "mknod, char": "mknod /tmp/mem c 1 1",
            "insmod": "f=$(mktemp); python3 -c 'import ctypes,sys; sys.exit(ctypes.CDLL(None).syscall(313, 0, b\"\", 0) != 0)'",
            "the host's root through proc": f"ls /proc/1/root{canary}",
            "chown outside the range": f"touch /tmp/x && chown {ids.COUNT} /tmp/x",
            "chown to the host's root": "python3 -c 'import os; os.chown(\"/tmp/x\", 4294967294, 0)'",
            "signal to the host": f"kill -9 {victim.pid}",
            "sysrq": "echo h > /proc/sysrq-trigger",
            "kexec": "python3 -c 'import ctypes,sys; sys.exit(ctypes.CDLL(None).syscall(246, 0, 0, 0, 0) != 0)'",
            "the clock": "date -s 2001-01-01",
            "swap": "swapoff -a && swapon /dev/zero",
            "a read-only share, remounted": "mount -o remount,rw,bind /read/only && touch /read/only/x",
            "a read-only share": "touch /read/only/x",
            "its own identity": "mount -o remount,rw,bind /etc/hvctl/identity; echo x > /etc/hvctl/identity/hvctl.name",
            "a bpf program": "python3 -c 'import ctypes,sys; sys.exit(ctypes.CDLL(None).syscall(321, 0, 0, 0) < 0)'",
            "hostname of the host": 'nsenter --target 1 --uts --user hostname pwned && [ "$(hostname)" != pwned ]',
        }
        # All by one exec: each in a shell of its own, in which it may do what it likes to itself.
        lines = [
            f"if ( {script} ) > /dev/null 2>&1; then echo {shlex.quote(what)}; fi" for what, script in attempts.items()
        ]
        done = run(settings, "exec", "boxed", "--", "sh", "-s", stdin="\n".join([*lines, "echo tried all", ""]))
        *succeeded, last = done.out.splitlines()
        assert last == "tried all", done
        assert succeeded == []
        assert victim.poll() is None
        assert Path("/proc/sys/kernel/core_pattern").read_text() == core_pattern
        assert canary.read_text() == "alive"
        assert os.uname().nodename != "pwned"
        assert time.gmtime().tm_year > 2001
    finally:
        victim.kill()
        victim.wait()


@container_only("the kernel of the host is its own")
def test_a_process_of_the_hosts_is_not_seen_from_inside_and_a_command_cannot_be_traced(
    settings: Config, boxed: Instance
) -> None:
    """The processes inside are its own: no number of the host's, no way to our memory while a command is entered."""
    seen = sh(settings, "boxed", "ps -eo comm=").split()
    assert not {"libvirtd", "dnsmasq", "pytest"} & set(seen)
    watch = """
import os, sys
mine = os.getpid()
for entry in os.listdir("/proc"):
    if entry.isdigit() and int(entry) != mine:
        for what in ("exe", "environ", "mem"):
            try:
                text = os.readlink(f"/proc/{entry}/exe") if what == "exe" else open(f"/proc/{entry}/{what}", "rb").read(1)
            except OSError:
                continue
            if "hvctl" in str(text) or "venv" in str(text):
                print("seen", entry, what, text)
"""
    assert "seen" not in run(settings, "exec", "boxed", "--", "python3", "-c", watch).out


@container_only("its files lie in a tree of the host's")
def test_its_setuid_programs_are_nobodys_on_the_host(host: Host, settings: Config, boxed: Instance) -> None:
    """Run by another user of the host they are refused, or run as an id that is nobody's."""
    assert sh(settings, "boxed", "cp /usr/bin/id /usr/local/bin/mine; chmod 4755 /usr/local/bin/mine") == ""
    libvirtd = Path("/run/libvirtd.pid").read_text()
    layer = host.store.layer(boxed.record.layers[-1]) / "upper/usr/local/bin/mine"
    mounted = host.store.container_root(boxed.record.uuid) / "usr/local/bin/mine"
    assert layer.stat().st_mode & 0o4000
    for path in (layer, mounted):
        words = [
            "nsenter",
            "--mount",
            "--target",
            libvirtd,
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
        ]
        done = subprocess.run([*words, str(path)], capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode != 0 or f"euid={boxed.record.first_id}" in done.stdout, (path, done)
        assert "euid=0" not in done.stdout


@container_only("directories shared with the host")
def test_a_shared_directory_is_open_to_nobody_else(host: Host, boxed: Instance) -> None:
    """The way through the instance's directory would lead around the closed parents of the shared one."""
    libvirtd = Path("/run/libvirtd.pid").read_text()
    for path in (host.store.container_mount(boxed.record.uuid, 0), host.store.container_root(boxed.record.uuid)):
        words = [
            "nsenter",
            "--mount",
            "--target",
            libvirtd,
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
        ]
        for user in (words, words[:4]):
            done = subprocess.run([*user, "ls", str(path)], capture_output=True, text=True, timeout=30, check=False)
            assert (done.returncode == 0) == (user == words[:4]), done


@container_only("directories shared with the host")
def test_what_its_root_writes_is_the_callers_outside(settings: Config, boxed: Instance) -> None:
    source = Path(boxed.record.spec.mounts[0].source)
    assert (
        sh(settings, "boxed", "echo hello > /data/file; chown 33:33 /data/file; touch /data/mine; stat -c %u /data")
        == "0\n"
    )
    assert ((source / "mine").stat().st_uid, (source / "mine").stat().st_gid) == (4242, 4343)
    assert (source / "file").stat().st_uid == (boxed.record.first_id or 0) + 33  # nobody's, and never a user's
    assert sh(settings, "boxed", "touch /read/only/x; echo $?").startswith("1\n")


@pytest.mark.apart
@container_only("directories shared with the host")
@pytest.mark.parametrize(
    ("words", "status", "named"),
    [
        (("--mount", "/nosuch:/data"), 7, "/nosuch"),
        (("--mount", "/srv:relative"), 7, "relative"),
        (("--mount", "/srv:/proc/x"), 7, "/proc/x"),
        (("--mount", "/srv:/"), 7, "'/'"),
        (("--mount", "/srv:/etc"), 7, "/etc/NAME"),
        (("--mount", "/srv:/usr"), 7, "would be hidden"),
        (("--mount", "/srv:/lib64"), 7, "would be hidden"),
        (("--mount", "/srv:/a/../etc"), 7, "would be hidden"),
        (("--mount", "/srv:/a/../b"), 7, "/a/../b"),
        (("--mount", "/srv"), 2, "/srv"),
        (("--mount", "/srv:/a:rw"), 2, "/srv:/a:rw"),
        (("--mount", "/srv:/a", "--mount", "/usr:/a"), 7, "twice"),
        (("--mount", "/srv:/a", "--mount", "/usr:/a/b"), 7, "lie in each other"),
        (("--mount", "/srv:/.oldroot/etc"), 7, "container's own"),
        (("--cpuset", "0-99999"), 7, "0-99999"),
        (("--cpuset", "x"), 7, "'x'"),
        (("--cpuset", "4000"), 7, "no CPU 4000"),
        (("--disk", "1G"), 6, "keeps no project quotas"),
        (("--require-kvm",), 6, "hvctl host features"),
        (("--privileged", "--template", "host-network"), 7, "host's network"),
        (("--processes", "1"), 2, "--processes"),
        (("--processes", "23"), 7, "--processes 24 or more"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    host: Host, settings: Config, tiny_image: str, words: tuple[str, ...], status: int, named: str
) -> None:
    before = look(host)
    done = run(settings, "create", "wrong", "--container", "--image", "tiny", "--no-start", *words)
    assert (done.status, done.out, len(done.err.splitlines())) == (status, "", 1), done
    assert named in done.err
    assert "; next: " in done.err
    assert world.differences(before, look(host)) == []


@pytest.mark.apart
@container_only("directories shared with the host")
@pytest.mark.parametrize("target", ["/sbin/init", "/var/log/old/data"])
def test_nothing_is_mounted_over_a_file(settings: Config, root_image: str, target: str) -> None:
    words = ("--container", "--image", root_image, "--no-start", "--mount", f"/srv:{target}")
    done = run(settings, "create", "wrong", *words)
    assert (done.status, len(done.err.splitlines())) == (7, 1), done
    assert "is a file or a link in image" in done.err


@pytest.mark.apart
@pytest.mark.only_mode(Mode.VM, "what only containers can is refused for a VM")
@pytest.mark.parametrize("words", [("--privileged",), ("--processes", "100"), ("--mount", "/srv:/data")])
def test_a_vm_says_what_it_cannot(host: Host, settings: Config, tiny_image: str, words: tuple[str, ...]) -> None:
    done = run(settings, "create", "wrong", "--image", "tiny", "--no-start", *words)
    assert (done.status, "hvctl host features" in done.err) == (6, True), done
    assert query.find(host, "wrong") is None


@container_only("exec by namespaces")
def test_exec_streams_both_ways(settings: Config, boxed: Instance) -> None:
    noise = secrets.token_bytes(20 * 1000 * 1000)
    assert run_bytes(settings, "exec", "boxed", "--", "cat", stdin=noise).stdout == noise


@container_only("exec by namespaces")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_the_command(settings: Config, boxed: Instance, number: signal.Signals) -> None:
    words = [sys.executable, "-m", "hvctl", "exec", "boxed", "--", "sh", "-c", "echo begun; exec sleep 100"]
    with subprocess.Popen(words, env=environment(settings), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        assert process.wait(timeout=30) == 128 + number
    assert "sleep 100" not in sh(settings, "boxed", "ps -eo args=")


@container_only("exec by namespaces")
def test_a_killed_exec_takes_its_command_along(settings: Config, boxed: Instance) -> None:
    words = [sys.executable, "-m", "hvctl", "exec", "boxed", "--", "sh", "-c", "echo begun; exec sleep 101"]
    with subprocess.Popen(words, env=environment(settings), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "begun\n"
        process.kill()
    wait_for(lambda: "sleep 101" not in sh(settings, "boxed", "ps -eo args="))
    assert "sleep 101" not in sh(settings, "boxed", "ps -eo args=")


IN_TERMINAL = "tty; stty size; read line; echo got $line; exit 7"


@container_only("exec by namespaces")
@pytest.mark.parametrize(
    ("command", "typed"), [(("--", "sh", "-c", IN_TERMINAL), "a line\n"), ((), f"{IN_TERMINAL}\na line\n")]
)
def test_exec_has_a_terminal_where_there_is_one(
    settings: Config, boxed: Instance, command: tuple[str, ...], typed: str
) -> None:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 33, 101, 0, 0))
    before = termios.tcgetattr(theirs)
    words = [sys.executable, "-m", "hvctl", "exec", "boxed", *command]
    process = subprocess.Popen(
        words, env=environment(settings), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.write(ours, typed.encode())
    status = process.wait(timeout=60)
    after = termios.tcgetattr(theirs)
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # EIO: the end
        while data := os.read(ours, 4096):
            said += data
    os.close(ours)
    assert status == 7, said
    assert b"/dev/pts/" in said
    assert b"33 101" in said
    assert b"got a line" in said
    assert after == before


@container_only("exec by namespaces")
def test_a_terminal_has_its_size_before_the_command_can_ask(
    host: Host, settings: Config, boxed: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However late this side gets to carrying keys over: here it never does."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 33, 101, 0, 0))
    monkeypatch.setattr(enter, "_carry", lambda command, *_words: command.wait())
    words = ["sh", "-c", "stty size > /tmp/size"]
    controller = controller_of(host, boxed.record)
    assert enter.run(controller, words, {}, streams=(theirs,) * 3, with_terminal=True) == 0
    assert sh(settings, "boxed", "cat /tmp/size").strip() == "33 101"
    os.close(ours)
    os.close(theirs)


@container_only("exec by namespaces")
def test_exec_says_what_cannot_be_run(settings: Config, boxed: Instance) -> None:
    assert run(settings, "exec", "boxed", "--", "no-such-program").status == 127
    assert run(settings, "exec", "boxed", "--", "/etc/passwd").status == 126
    assert run(settings, "exec", "boxed", "--", "sh", "-c", "kill -9 $$").status == 137
    assert run(settings, "exec", "boxed", "--", "sh", "-c", "cat /proc/self/status").out.count("CapBnd") == 1
    bound = "grep CapBnd /proc/1/status /proc/self/status | cut -f2 | sort -u | wc -l"
    assert sh(settings, "boxed", bound).strip() == "1"  # a command can no more than its first process


@container_only("its processes are the host's")
def test_a_reboot_inside_restarts_it_with_everything(host: Host, settings: Config, boxed: Instance) -> None:
    first = groups.find_init(controller_of(host, boxed.record))
    assert sh(settings, "boxed", "echo kept > /data/kept") == ""
    run(settings, "exec", "boxed", "--", "reboot")
    wait_for(lambda: query.get(host, "boxed").state is State.RUNNING and not Path(f"/proc/{first}").exists())
    assert run(settings, "start", "boxed").status == 0
    assert groups.find_init(controller_of(host, boxed.record)) != first
    assert sh(settings, "boxed", "cat /data/kept").strip() == "kept"
    assert "Cannot fork" in sh(settings, "boxed", FORK_BOMB)
    end_bomb(host, boxed)


@container_only("its processes are the host's")
def test_a_killed_controller_leaves_nothing_mounted(host: Host, settings: Config, debian_image: str) -> None:
    before = look(host)
    instance = make(host, "orphaned", debian_image)
    os.kill(controller_of(host, instance.record), signal.SIGKILL)
    wait_for(lambda: query.get(host, "orphaned").state is not State.RUNNING)
    wait_for(lambda: look(host).mounts == before.mounts)
    assert run(settings, "start", "orphaned").status == 0
    lifecycle.delete(host, "orphaned")
    assert world.differences(before, look(host)) == []


@container_only("its disk is the host's")
def test_a_full_disk_is_told_inside_and_the_container_goes_on(host: Host, settings: Config, debian_image: str) -> None:
    """Its layer on a small file system of libvirtd's: the write fails as on any disk, and succeeds when there is space."""
    instance = make(host, "crammed", debian_image)
    assert usage.measure(host, "crammed").disk_bytes < 1 * MIB  # a first boot, journal and all
    assert run(settings, "stop", "crammed").status == 0
    layer = host.store.layer(instance.record.layers[-1])
    inside = ["nsenter", "--mount", "--target", Path("/run/libvirtd.pid").read_text(), "sh", "-c"]
    script = f"cp -a {layer} /run/moved; mount -t tmpfs -o mode=700,size=16m tmpfs {layer}; cp -a /run/moved/. {layer}/"
    subprocess.run([*inside, f"{script}; rm -rf /run/moved"], check=True, timeout=60)
    try:
        assert run(settings, "start", "crammed").status == 0
        assert "No space left" in sh(settings, "crammed", "head -c 40000000 /dev/zero > /root/big")
        assert sh(settings, "crammed", "systemctl is-active ssh").strip() == "active"
        subprocess.run([*inside, f"mount -o remount,size=200m {layer}"], check=True, timeout=60)
        assert sh(settings, "crammed", "head -c 40000000 /dev/zero > /root/big && echo ok") == "ok\n"
    finally:
        lifecycle.stop(host, "crammed", force=True)
        subprocess.run([*inside, f"umount {layer}"], check=True, timeout=60)
        lifecycle.delete(host, "crammed")


def rename_and_die(host: Host, name: str) -> None:
    """Killed where libvirt has forgotten the old name and was not told the new one."""
    domains.define = lambda *_arguments: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    change.rename(host, name, "late")


@container_only("cloud-init gets a directory, not a disk")
def test_user_data_reaches_cloud_init(host: Host, settings: Config, debian_image: str, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("#cloud-config\nruncmd: [[touch, /root/was-here]]\n")
    words = ("--container", "--image", debian_image, "--memory", "256M", "--user-data", str(tmp_path / "data"))
    assert run(settings, "create", "clouded", *words).status == 0
    try:
        assert "was-here" in sh(settings, "clouded", "cloud-init status --wait > /dev/null; ls /root")
    finally:
        lifecycle.delete(host, "clouded")


@pytest.mark.apart
@container_only("libvirt-LXC cannot rename")
@pytest.mark.parametrize("converge", ["gc", "rename", "delete"])
def test_killed_between_two_names_it_is_neither_lost_nor_usable(
    host: Host, settings: Config, tiny_image: str, converge: str
) -> None:
    """In the moment in which libvirt has it under neither name."""
    before = look(host)
    record = create.create(host, create.Request(spec=tiny.make_spec("early", Mode.CONTAINER), start=False)).record
    victims.die_in(settings, rename_and_die, "early")
    assert domains.find(host.connection(Mode.CONTAINER), "early") is None
    assert domains.find(host.connection(Mode.CONTAINER), "late") is None
    assert [item.state for item in host.instances() if item.record.uuid == record.uuid] == [State.INCOMPLETE]
    for name in ("early", "late"):
        assert run(settings, "start", name).status == 5
    assert run(settings, "create", "early", "--image", "tiny", "--no-start").status == 5
    if converge == "gc":
        assert all(item.is_done for item in gc.collect(host))
    elif converge == "rename":
        assert run(settings, "rename", "early", "late").status == 0
    if converge != "delete":
        assert query.get(host, "late").record.uuid == record.uuid
        assert gc.collect(host) == ()
    lifecycle.delete(host, "late")
    assert world.differences(before, look(host)) == []


@container_only("a hook mounts its root")
def test_a_root_that_cannot_be_mounted_is_told_and_nothing_is_left(host: Host, debian_image: str) -> None:
    spec = Spec(name="rootless", mode=Mode.CONTAINER, image=debian_image, memory_bytes=128 * MIB)
    record = create.create(host, create.Request(spec=spec, start=False)).record
    before = look(host)
    upper = host.store.layer(record.layers[-1]) / "upper"
    upper.rename(upper.with_name("away"))
    with pytest.raises(HostError, match=r"rootless.*No such file"):
        lifecycle.start(host, "rootless")
    upper.with_name("away").rename(upper)
    now = look(host)
    assert (now.mounts, now.groups, now.notes, now.filters) == (
        before.mounts,
        before.groups,
        before.notes,
        before.filters,
    )
    assert lifecycle.start(host, "rootless")
    lifecycle.delete(host, "rootless")


@container_only("libvirt's stub would run with the host's root")
def test_a_half_made_one_cannot_be_started_by_virsh(host: Host, settings: Config, tiny_image: str) -> None:
    victims.die_at(settings, make_tiny_container, "create", "files", "half-made")
    started = subprocess.run(
        ["virsh", "-c", settings.container_uri, "start", "half-made"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert started.returncode != 0, started
    assert query.get(host, "half-made").live.state is State.STOPPED
    assert all(item.is_done for item in gc.collect(host))
    assert query.find(host, "half-made") is None


@pytest.mark.apart
@container_only("ids of its own")
@pytest.mark.parametrize("count", [30, pytest.param(100, marks=pytest.mark.long)])
def test_ranges_do_not_overlap_however_many_are_given_at_once(host: Host, tiny_image: str, count: int) -> None:
    from concurrent.futures import ThreadPoolExecutor

    before = look(host)
    names = [f"many-{number}" for number in range(count)]

    def make_one(name: str) -> Record:
        return create.create(host, create.Request(spec=tiny.make_spec(name, Mode.CONTAINER), start=False)).record

    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(make_one, names))
        firsts = sorted(record.first_id or 0 for record in records)
        assert all(later - earlier >= ids.COUNT for earlier, later in itertools.pairwise(firsts))
        assert firsts[0] >= 0x70000000
        assert len({record.mac for record in records} | {record.address for record in records}) == 2 * count
        list(pool.map(lambda name: lifecycle.delete(host, name), names))
    assert world.differences(before, look(host)) == []


@container_only("privileged mode")
def test_a_privileged_one_is_seen_and_is_nobody_elses(host: Host, settings: Config, debian_image: str) -> None:
    made = run(
        settings, "create", "trusted", "--container", "--privileged", "--image", debian_image, "--memory", "256M"
    )
    try:
        assert made.status == 0, made.err
        assert "privileged" in run(settings, "list").out
        assert "privileged" in made.err
        assert sh(settings, "trusted", "cat /proc/self/uid_map").split() == ["0", "0", "4294967295"]
        assert sh(settings, "trusted", "systemctl is-active ssh").strip() == "active"
        assert "not permitted" in sh(settings, "trusted", "mknod /tmp/disk b 254 0")
        record = query.get(host, "trusted").record
        assert (host.store.instance(record.uuid).stat().st_mode & 0o777, record.first_id) == (0o710, 0)
    finally:
        lifecycle.delete(host, "trusted")


@container_only("the host's network")
def test_on_the_hosts_network_it_has_no_address_of_its_own(host: Host, settings: Config, debian_image: str) -> None:
    words = (
        "create",
        "guestless",
        "--container",
        "--template",
        "host-network",
        "--image",
        debian_image,
        "--memory",
        "256M",
    )
    made = run(settings, *words)
    try:
        assert made.status == 0, made.err
        assert "br-" in sh(settings, "guestless", "ip -br link")
        assert query.get(host, "guestless").record.address == ""
        refused = run(settings, "ssh", "guestless", "--", "true")
        assert (refused.status, "hvctl exec guestless" in refused.err) == (255, True)
        assert run(settings, "restart", "guestless").status == 0
        assert "not permitted" in sh(settings, "guestless", "ip link add dummy7 type dummy")
    finally:
        lifecycle.delete(host, "guestless")
