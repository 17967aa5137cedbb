"""The proof on real guests, both modes: what a user does, from nothing to nothing, beside another that must not notice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvctl import gc, hostsetup
from hvctl.config import Config
from hvctl.errors import HvctlError
from hvctl.events import Event, Sink, StepStarted
from hvctl.host import Host
from hvctl.hostsetup import network
from hvctl.hostside import daemons, files, filters
from hvctl.instances import create, lifecycle, query, recovery
from hvctl.libvirtapi import connection, domains, networks
from hvctl.model import Instance, Mode, Spec, State, Wait
from hvctl.rootfs import published
from hvctl.units import MIB, parse_size
from tests import victims, world
from tests.cli import call, environment, run, run_bytes, wait_for

pytestmark = pytest.mark.guest


KIND = {Mode.VM: (), Mode.CONTAINER: ("--container",)}
"""The words of `create` that make one of a mode."""


def make(host: Host, name: str, mode: Mode, image: str, **options: object) -> Instance:
    from hvctl.access import keys

    spec = Spec(name=name, mode=mode, image=image, cpus=2, memory_bytes=512 * MIB)
    return create.create(host, create.Request(spec=spec, authorized_keys=keys.find_public_keys(()), **options))  # type: ignore[arg-type]


def virsh(settings: Config, mode: Mode) -> list[str]:
    """The words that begin a virsh command for a mode."""
    return ["virsh", "-c", {Mode.VM: settings.vm_uri, Mode.CONTAINER: settings.container_uri}[mode]]


def hash_image(host: Host, name: str) -> dict[str, tuple[str, int, int]]:
    """Hash, owner and mode of every file of an image; of its tree owner, mode, size and time, in one hash."""
    folder = host.store.image(published.get_image(host, name).id)
    found = {
        path.name: (files.hash_file(path), path.stat().st_uid, path.stat().st_mode)
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    digest = hashlib.sha256()
    for root, folders, names in os.walk(folder / "tree"):
        folders.sort()
        for entry in sorted((*folders, *names)):
            facts = os.lstat(f"{root}/{entry}")
            told = (entry, facts.st_mode, facts.st_uid, facts.st_gid, facts.st_size, facts.st_mtime_ns, facts.st_nlink)
            digest.update(repr(told).encode())
    return {**found, "tree": (digest.hexdigest(), 0, 0)}


@pytest.fixture(scope="module")
def untouched_image(host: Host, debian_image: str) -> dict[str, tuple[str, int, int]]:
    """What the image's files were before any guest used them."""
    return hash_image(host, debian_image)


@pytest.fixture(scope="module")
def running(host: Host, mode: Mode, debian_image: str, untouched_image: object) -> Iterator[Instance]:
    """One of each mode that answers over ssh, shared by the tests that do not change its state."""
    instance = make(host, "running", mode, debian_image)
    yield instance
    lifecycle.delete(host, "running")


def booted_at(settings: Config, name: str) -> str:
    """When its first process began (proc(5), stat, field 22)."""
    return run(settings, "exec", name, "--", "cut", "-d ", "-f22", "/proc/1/stat").out


def leased(host: Host) -> set[str]:
    """The MACs that the network's dnsmasq has lent an address to."""
    network = networks.get(host.connection(Mode.VM), host.config.network)
    return {lease["mac"] for lease in network.DHCPLeases()}


def test_the_life_of_one(host: Host, settings: Config, mode: Mode, debian_image: str, running: Instance) -> None:
    before = world.look(host, alive=running.record)
    boots_before = booted_at(settings, "running")
    name = "alive"

    made = run(settings, "create", name, *KIND[mode], "--image", debian_image, "--memory", "512M")
    assert made.status == 0, made.err
    assert run(settings, "ssh", name, "--", "echo kept > /root/file; sync").status == 0
    found = run(settings, "ssh", "running", "--", "getent", "hosts", name).out.split()
    assert found[:1] == [query.get(host, name).record.address]  # guests find each other by name
    run(settings, "set", name, "--autostart")
    stopped = run(settings, "stop", name)
    assert (stopped.status, stopped.out) == (0, f"{name}: stopped\n"), stopped.err
    assert run(settings, "stop", name).out == f"{name}: was stopped already\n"

    assert run(settings, "rename", name, "renamed").out == "renamed: was alive\n"
    assert query.find(host, name) is None
    name = "renamed"
    assert query.get(host, name).live.is_autostart
    assert run(settings, "start", name).status == 0
    found = run(settings, "ssh", name, "--", "hostname; cat /etc/hostname /root/file").out
    assert found == "renamed\nrenamed\nkept\n"
    assert run(settings, "exec", name, "--", "sh", "-c", "exit 7").status == 7

    noise = secrets.token_bytes(200 * 1000)  # an emulated guest decrypts a megabyte in seconds; test_ssh.py sends ten
    assert run_bytes(settings, "ssh", name, "--", "cat", stdin=noise).stdout == noise

    assert run(settings, "delete", name).status == 2  # without a terminal it wants --yes
    mac = query.get(host, name).record.mac
    assert mac in leased(host)
    assert run(settings, "delete", "--yes", name).status == 0
    wait_for(lambda: mac not in leased(host))  # dnsmasq tells libvirt by a program of its own
    assert mac not in leased(host)
    assert world.differences(before, world.look(host, alive=running.record)) == []
    assert booted_at(settings, "running") == boots_before


def test_the_image_is_untouched_after_guests_used_it(
    host: Host, debian_image: str, untouched_image: dict[str, tuple[str, int, int]], running: Instance
) -> None:
    now = hash_image(host, debian_image)
    assert now == untouched_image
    assert {owner for _hash, owner, _mode in now.values()} == {0}


def test_list_and_show_say_the_same_as_libvirt(settings: Config, mode: Mode, running: Instance) -> None:
    listed = json.loads(run(settings, "list", "--json").out)
    entry = next(item for item in listed if item["name"] == "running")
    assert (entry["state"], entry["mode"], entry["cpus"]) == ("running", mode, 2)
    assert entry == json.loads(run(settings, "show", "running", "--json").out)
    assert "running" in run(settings, "list").out
    assert "\x1b" not in run(settings, "list").out


def test_a_guest_knows_its_name_and_is_healthy(settings: Config, running: Instance) -> None:
    done = run(settings, "ssh", "running", "--", "hostname; cat /etc/hostname; systemctl is-system-running --wait")
    assert done.out.split() == ["running", "running", "running"], done


def test_exec_passes_input_output_and_arguments(settings: Config, running: Instance) -> None:
    done = run(settings, "exec", "running", "--", "sh", "-c", 'cat; echo "$1" >&2', "sh", "$(id); 'x'\n", stdin="in\n")
    assert (done.status, done.out, done.err) == (0, "in\n", "$(id); 'x'\n\n")
    assert run(settings, "exec", "running", "--", "no-such-program").status == 127
    done = run(settings, "exec", "running", stdin="shopt -q login_shell && echo $((6 * 7)) $0 $PWD\nexit 3\n")
    assert (done.status, done.out, done.err) == (3, "42 /bin/bash /root\n", "")
    lines = run(settings, "exec", "running", "--", "seq", "1", "200000").out.split()
    assert lines == [str(number) for number in range(1, 200001)]


@pytest.mark.only_mode(Mode.VM, "the guest agent has no terminal")
def test_exec_has_no_terminal_in_a_vm(settings: Config, mode: Mode, running: Instance) -> None:
    done = run(settings, "exec", "-t", "running", "--", "id")
    assert (done.status, "hvctl host features" in done.err) == (255, True)


@pytest.mark.only_mode(Mode.VM, "the guest agent takes its input whole; a container's exec streams")
def test_exec_refuses_more_input_than_the_agent_takes(settings: Config, mode: Mode, running: Instance) -> None:
    done = run_bytes(settings, "exec", "running", "--", "wc", "-c", stdin=b"x" * (1024 * 1024 + 1))
    assert (done.returncode, done.stdout) == (255, b"")
    assert run_bytes(settings, "exec", "running", "--", "wc", "-c", stdin=b"x" * 1024 * 1024).stdout == b"1048576\n"


def test_root_sits_at_the_console(settings: Config, mode: Mode, running: Instance) -> None:
    said, deadline_s = "", time.monotonic() + 60
    while "42" not in said and time.monotonic() < deadline_s:  # the login comes after sshd
        said += run(settings, "console", "running", stdin="\necho $((6 * 7))\n").out
    assert "root@running" in said
    assert "42" in said
    done = run(settings, "console", "running", "--force", stdin="\n")
    assert (done.status, "hvctl host features" in done.err) == ((6, True) if mode is Mode.CONTAINER else (0, False))


def test_who_leaves_the_console_is_on_a_new_line(settings: Config, mode: Mode, running: Instance) -> None:
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "hvctl", "console", "running"]
    with subprocess.Popen(command, env=environment(settings), stdin=theirs, stdout=theirs, stderr=theirs) as process:
        said = b""
        while b"Enter shows a prompt" not in said and process.poll() is None:
            if select.select([ours], [], [], 0.1)[0]:
                said += os.read(ours, 4096)
        assert b"Enter shows a prompt" in said
        wait_for(lambda: not tty_is_cooked(theirs))
        os.write(ours, b"\x1d")
        assert process.wait(timeout=30) == 0
    os.close(theirs)
    with contextlib.suppress(OSError):  # EIO: the end
        while data := os.read(ours, 4096):
            said += data
    os.close(ours)
    assert said.endswith(b"\r\n")
    assert said.count(b"\r\n") > 1  # one ends what hvctl says at the beginning


def tty_is_cooked(descriptor: int) -> bool:
    """Whether keys are not yet passed on as they are."""
    local_flags: int = termios.tcgetattr(descriptor)[3]
    return bool(local_flags & termios.ICANON)


# hvctl, which says so once all that it still does is to wait.
TELLS_THAT_IT_WAITS = """
from hvctl.cli.main import main
from hvctl.instances import wait
found = wait.probe
def probe(endpoint):
    print("waits", flush=True)
    return found(endpoint)
wait.probe = probe
main()
"""


@pytest.mark.only_mode(Mode.VM, "a container is up too soon for anybody to stop waiting")
def test_who_stops_waiting_is_told_what_runs(host: Host, settings: Config, mode: Mode, debian_image: str) -> None:
    words = ["create", "awaited", "--image", debian_image, "--memory", "512M"]
    command = [sys.executable, "-c", TELLS_THAT_IT_WAITS, *words]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(settings), **streams) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "waits\n"
        process.send_signal(signal.SIGINT)
        _out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    told = "hvctl: interrupted while waiting for 'awaited', which is there and runs; next: wait on: hvctl start awaited"
    assert err.splitlines()[-1] == told
    assert query.get(host, "awaited").state is State.RUNNING
    lifecycle.delete(host, "awaited")


@pytest.mark.long_in(Mode.VM)
def test_who_stops_waiting_for_a_shutdown_is_told_that_it_goes_on(
    host: Host, settings: Config, running: Instance
) -> None:
    """Its init is kept from it by a service that takes its time to end."""
    slow = "systemd-run --unit=slow --property=ExecStop='sleep 600' --property=RemainAfterExit=yes true"
    assert run(settings, "exec", "running", "--", "sh", "-c", slow).status == 0
    command = [sys.executable, "-m", "hvctl", "stop", "running"]
    with subprocess.Popen(command, env=environment(settings), stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: "stopping" in run(settings, "exec", "running", "--", "systemctl", "is-system-running").out)
        process.send_signal(signal.SIGINT)
        _out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    told = "which was asked to shut down and goes on with it; next: wait on: hvctl stop running"
    assert err.splitlines()[-1].endswith(told)
    assert query.get(host, "running").state is State.RUNNING
    assert run(settings, "restart", "--force", "running").status == 0


def test_the_log_tells_of_the_boot(settings: Config, mode: Mode, running: Instance) -> None:
    lines = json.loads(run(settings, "logs", "running", "--json").out)["lines"]
    assert any("running" in line for line in lines), lines[-20:]
    assert len(run(settings, "logs", "running", "-n", "2").out.splitlines()) == 2


def test_what_it_takes_of_the_host_is_measured(settings: Config, mode: Mode, running: Instance) -> None:
    found = json.loads(run(settings, "usage", "running", "--json").out)[0]
    assert (found["name"], found["mode"]) == ("running", mode)
    assert 1 * MIB < found["memory_used_bytes"] < 4096 * MIB
    before = found["disk_used_bytes"]
    assert (
        run(settings, "exec", "running", "--", "sh", "-c", "head -c 3000000 /dev/urandom > /root/more; sync").status
        == 0
    )
    assert json.loads(run(settings, "usage", "running", "--json").out)[0]["disk_used_bytes"] > before + 2 * MIB


def test_a_changed_host_key_is_a_hard_error(host: Host, settings: Config, running: Instance) -> None:
    """Somebody else's key at its address: nothing is sent, nothing is run."""
    from dataclasses import replace

    from hvctl.access import keys, ssh
    from hvctl.errors import HostError

    other = replace(query.get_endpoint(host, "running"), host_key=keys.new_pair().public)
    with pytest.raises(HostError, match="is not the one that hvctl made"):
        ssh.run(other, ["true"])


def test_nothing_secret_is_world_readable_or_in_libvirt(host: Host, mode: Mode, running: Instance) -> None:
    uuid = running.record.uuid
    private = (host.store.identity(uuid) / "hvctl.host_key").read_text().split("\n")[1]
    domain = domains.get(host.connection(mode), uuid)
    assert private not in domain.XMLDesc()
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert not any(private.encode() in words for words in commands)
    assert (
        subprocess.run(
            ["grep", "-rqs", private, str(host.store.root)],
            user=65534,
            group=65534,
            extra_groups=[],
            timeout=60,
            check=False,
        ).returncode
        != 0
    )


def test_the_definition_is_valid_for_libvirts_own_tools(
    settings: Config, mode: Mode, running: Instance, tmp_path: Path
) -> None:
    file = tmp_path / "domain.xml"
    dump = [*virsh(settings, mode), "dumpxml", "--inactive", "running"]
    file.write_text(subprocess.run(dump, capture_output=True, text=True, timeout=30, check=True).stdout)
    checked = subprocess.run(["virt-xml-validate", str(file), "domain"], capture_output=True, timeout=30, check=False)
    assert checked.returncode == 0, checked


def test_pause_and_resume(host: Host, settings: Config, running: Instance) -> None:
    assert run(settings, "pause", "running").out == "running: paused\n"
    assert run(settings, "pause", "running").out == "running: was paused already\n"
    assert query.get(host, "running").state is State.PAUSED
    refused = run(settings, "ssh", "running", "--", "true")
    assert (refused.status, "hvctl resume running" in refused.err) == (255, True)
    assert run(settings, "stop", "running").status == 5
    assert run(settings, "resume", "running").out == "running: resumed\n"
    assert run(settings, "ssh", "running", "--", "true").status == 0


def test_one_that_nobody_reaches_is_asked_what_it_has(settings: Config, mode: Mode, running: Instance) -> None:
    try:
        assert run(settings, "exec", "running", "--", "ip", "link", "set", "eth0", "down").status == 0
        told = run(settings, "start", "running", "--timeout", "1")
        assert told.status == 10
        assert f"inside it has no address; {running.record.address} was given to it" in told.err
    finally:
        run(settings, "exec", "running", "--", "ip", "link", "set", "eth0", "up")
    assert run(settings, "start", "running").status == 0


def test_set_says_what_is_live_and_what_waits(host: Host, settings: Config, mode: Mode, running: Instance) -> None:
    done = json.loads(run(settings, "set", "running", "--cpus", "1", "--memory", "384M", "--autostart", "--json").out)
    assert {item["field"]: item["live"] for item in done} == {
        "cpus": mode is Mode.CONTAINER,  # a quota can go up and down; a CPU that a guest has cannot be taken away
        "memory": True,
        "autostart": True,
    }
    assert query.get(host, "running").live.is_autostart
    assert run(settings, "set", "running", "--no-autostart", "--cpus", "2", "--memory", "512M").status == 0
    assert not query.get(host, "running").live.is_autostart


def test_what_waits_for_the_next_start_is_shown_beside_what_holds(
    host: Host, settings: Config, mode: Mode, running: Instance
) -> None:
    """More than a VM was started with, or less than a container uses. A balloon takes a moment."""
    wait_for(lambda: query.get(host, "running").live.memory_bytes == 512 * MIB)
    asked = "1GiB" if mode is Mode.VM else "64MiB"
    if mode is Mode.CONTAINER:
        assert run(settings, "exec", "running", "--", "sh", "-c", "head -c 200M /dev/zero >/run/much").status == 0
    assert json.loads(run(settings, "set", "running", "--memory", asked, "--json").out)[0]["live"] is False
    assert f"512MiB ({asked} from the next start on)" in run(settings, "show", "running").out
    shown = json.loads(run(settings, "show", "running", "--json").out)
    assert (shown["memory_bytes"], shown["asked"]["memory_bytes"]) == (512 * MIB, parse_size(asked))
    assert "  512MiB  " in run(settings, "list").out
    run(settings, "exec", "running", "--", "rm", "-f", "/run/much")
    assert json.loads(run(settings, "set", "running", "--memory", "512MiB", "--json").out)[0]["live"] is True
    wait_for(lambda: query.get(host, "running").live.memory_bytes == 512 * MIB)
    assert "from the next start" not in run(settings, "show", "running").out


def test_rename_of_a_running_one_is_refused(settings: Config, running: Instance) -> None:
    done = run(settings, "rename", "running", "other")
    assert (done.status, "hvctl stop running" in done.err) == (5, True)


@pytest.mark.long_in(Mode.VM, how=signal.SIGTERM)
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_libvirtd_that_restarts_finds_its_guests_as_they_were(
    host: Host, settings: Config, mode: Mode, running: Instance, how: signal.Signals
) -> None:
    booted = booted_at(settings, "running")
    restart_libvirtd(host, how)
    assert query.get(host, "running").state is State.RUNNING
    assert booted_at(settings, "running") == booted
    known = {guest.device: (guest.mac, guest.address) for guest in filters.guests()}
    assert known[running.record.device] == (running.record.mac, running.record.address)
    assert run(settings, "ssh", "running", "--", "true").status == 0


@pytest.mark.long_in(Mode.VM)
@pytest.mark.parametrize("words", [("resume", "running"), ("stop", "--force", "running")])
def test_what_was_paused_before_libvirtd_restarted_can_go_on_or_be_ended(
    host: Host, settings: Config, running: Instance, words: tuple[str, ...]
) -> None:
    assert run(settings, "pause", "running").status == 0
    restart_libvirtd(host, signal.SIGTERM)
    assert query.get(host, "running").state is State.PAUSED
    assert run(settings, *words).err == ""
    assert run(settings, "start", "running").status == 0
    assert run(settings, "exec", "running", "--", "true").status == 0


def restart_libvirtd(host: Host, how: signal.Signals) -> None:
    """End libvirtd and start another as `hvctl host setup` does, in the namespace of the one before."""
    libvirtd = int(Path("/run/libvirtd.pid").read_text())
    os.kill(libvirtd, how)
    deadline_s = time.monotonic() + 30
    while daemons.find_running("libvirtd") and time.monotonic() < deadline_s:
        time.sleep(0.05)
    host.close()
    hostsetup.setup(host)


@pytest.mark.long_in(Mode.VM)
def test_a_filter_that_somebody_flushed_is_back_at_the_next_start(
    host: Host, settings: Config, mode: Mode, running: Instance
) -> None:
    for family in ("bridge", "ip"):  # ours alone: others' tables on this machine are not to be flushed by a test
        subprocess.run(["nft", "delete", "table", family, "hvctl"], check=True, timeout=30)
    assert not filters.is_in_place()
    assert run(settings, "restart", "running").status == 0
    assert filters.is_in_place()
    ruleset = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, timeout=30, check=True).stdout
    assert f'"{running.record.device}" . {running.record.mac} . {running.record.address}' in ruleset


def test_it_cannot_pretend_to_be_another(host: Host, settings: Config, mode: Mode, running: Instance) -> None:
    """Frames from inside, as its root: another's address, another's MAC, an ARP answer for the gateway. None arrives."""
    gateway = running.record.address.rpartition(".")[0] + ".1"
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as tap:
        tap.bind((network.bridge_name(settings.network), 0))
        tap.settimeout(5)
        sent = run(settings, "exec", "running", "--", "python3", "-", gateway, running.record.address, stdin=FORGER)
        assert sent.out == "sent 4\n", sent
        seen = []
        while b"honest" not in b"".join(seen):  # sent last; a timeout fails the test
            seen.append(tap.recv(2048))
    assert not [frame for frame in seen if b"forged" in frame]


# Sends UDP to the gateway: from another address, from another MAC, an ARP answer that the gateway is here; then an honest one.
FORGER = """
import socket, struct, sys
gateway, own = (socket.inet_aton(word) for word in sys.argv[1:])
tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
tap.bind(("eth0", 0))
mac = open("/sys/class/net/eth0/address").read().strip()
mine, other = bytes.fromhex(mac.replace(":", "")), bytes.fromhex("520000000001")
everybody = b"\\xff" * 6

def udp(source, text):
    data = struct.pack("!4H", 4000, 4001, 8 + len(text), 0) + text
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(data), 1, 0, 64, 17, 0, source, gateway)
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    return head[:10] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + head[12:] + data

arp = struct.pack("!HHBBH6s4s6s4s", 1, 0x800, 6, 4, 2, mine, gateway, everybody, own) + b"forged"
frames = [
    everybody + mine + b"\\x08\\0" + udp(gateway, b"forged address"),
    everybody + other + b"\\x08\\0" + udp(own, b"forged mac"),
    everybody + mine + b"\\x08\\x06" + arp,
    everybody + mine + b"\\x08\\0" + udp(own, b"honest"),
]
print("sent", sum(tap.send(frame) > 0 for frame in frames))
"""


@pytest.mark.only_mode(Mode.VM, "one test is about both at once")
def test_a_vm_and_a_container_find_each_other(
    host: Host, settings: Config, mode: Mode, debian_image: str, running: Instance
) -> None:
    neighbour = make(host, "neighbour", Mode.CONTAINER, debian_image)
    try:
        for here, there in (("running", neighbour), ("neighbour", running)):
            found = run(settings, "ssh", here, "--", "getent", "hosts", there.name).out.split()
            assert found[:1] == [there.record.address]
            reached = run(settings, "ssh", here, "--", "bash", "-c", f"exec 3<>/dev/tcp/{there.name}/22; head -c 4 <&3")
            assert reached.out == "SSH-"
    finally:
        lifecycle.delete(host, "neighbour")


def start_it(host: Host, name: str, events: Sink) -> object:
    return lifecycle.start(host, name, goal=Wait.RUNNING, events=events)


def stop_it(host: Host, name: str, events: Sink) -> object:
    return lifecycle.stop(host, name, events=events)


@pytest.mark.long_in(Mode.VM)
def test_a_killed_start_or_stop_is_done_by_the_same_command(
    host: Host, settings: Config, mode: Mode, running: Instance
) -> None:
    victims.die_at(settings, stop_it, "stop", "shutdown", "running")
    assert gc.collect(host) == ()
    assert run(settings, "stop", "running").status == 0
    for step in ("network", "start", "wait"):
        lifecycle.stop(host, "running", force=True)
        victims.die_at(settings, start_it, "start", step, "running")
        assert gc.collect(host) == ()
        assert run(settings, "start", "running", "--wait", "running").status == 0
        assert query.get(host, "running").state is State.RUNNING
    assert run(settings, "start", "running").status == 0


@pytest.mark.long_in(Mode.VM, step="files")
@pytest.mark.long_in(Mode.CONTAINER, step="define")
@pytest.mark.parametrize("step", ["files", "define", "start"])
def test_a_libvirtd_killed_in_the_middle_of_a_create(
    host: Host, settings: Config, mode: Mode, debian_image: str, running: Instance, step: str
) -> None:
    before = world.look(host, alive=running.record)
    name = "cut-short"

    def kill(event: Event) -> None:
        if isinstance(event, StepStarted) and event.step == step:
            with contextlib.suppress(ProcessLookupError):  # the step again, before systemd has brought the next one
                os.kill(int(Path("/run/libvirtd.pid").read_text()), signal.SIGKILL)

    spec = Spec(name=name, mode=mode, image=debian_image, memory_bytes=512 * MIB)
    with pytest.raises(HvctlError):
        create.create(host, create.Request(spec=spec, wait=Wait.RUNNING), kill)
    restart_libvirtd(host, signal.SIGTERM)
    visible = [instance.state for instance in host.instances() if instance.name == name]
    # Where systemd brings libvirtd back at once, hvctl has undone it all by itself.
    assert visible in ([[State.STOPPED]] if step == "start" else [[State.INCOMPLETE], []])
    if visible == [State.INCOMPLETE]:
        assert "hvctl gc" in run(settings, "start", name).err
    if step == "start":
        assert run(settings, "start", name, "--wait", "running").status == 0
    else:
        assert run(settings, "create", name, *KIND[mode], "--image", debian_image, "--wait", "running").status == 0
    assert query.get(host, name).state is State.RUNNING
    lifecycle.delete(host, name)
    assert world.differences(before, world.look(host, alive=running.record)) == []


@pytest.mark.only_mode(Mode.VM, "libvirtd is one for both, and the test waits for its silence")
def test_a_libvirtd_that_hangs_is_told_and_not_waited_for(
    settings: Config, mode: Mode, running: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "OPEN_TIMEOUT_S", 1)
    libvirtd = int(Path("/run/libvirtd.pid").read_text())
    os.kill(libvirtd, signal.SIGSTOP)
    try:
        done = call(settings, "list")
    finally:
        os.kill(libvirtd, signal.SIGCONT)
    assert (done.status, done.out) == (10, "")
    assert "did not answer" in done.err
    assert "hvctl host doctor" in done.err


def test_a_lost_connection_is_made_anew(host: Host, mode: Mode, running: Instance) -> None:
    """A process that lives longer than its connection (a web page, a test run) goes on with a fresh one."""
    host.connection(mode).handle.close()
    assert query.get(host, "running").state is State.RUNNING


def test_virsh_can_do_it_all_and_a_lost_definition_comes_back(
    host: Host, settings: Config, mode: Mode, running: Instance
) -> None:
    """virsh shutdown and start work; after `virsh undefine` the guest comes back with its data, keys and address."""
    words = virsh(settings, mode)
    assert run(settings, "ssh", "running", "--", "echo data > /root/data; sync").status == 0
    subprocess.run([*words, "shutdown", "running"], check=True, timeout=60)
    deadline_s = time.monotonic() + 60
    while query.get(host, "running").state is not State.STOPPED and time.monotonic() < deadline_s:
        time.sleep(0.1)
    subprocess.run([*words, "undefine", "running"], check=True, timeout=60)
    assert query.find(host, "running") is None
    assert [record.name for record in recovery.list_lost(host)] == ["running"]
    assert run(settings, "host", "recover").out == "running\n"
    assert run(settings, "host", "recover", "running").status == 0
    assert query.get(host, "running").record == running.record
    subprocess.run([*words, "start", "running"], check=True, timeout=60)
    assert run(settings, "start", "running").out == "running: was running already\n"  # and it answers over ssh
    assert run(settings, "ssh", "running", "--", "cat", "/root/data").out == "data\n"


def in_libvirtds_namespace(*words: str) -> None:
    """A file system that is mounted outside is not seen by a libvirtd that lives in a mount namespace of its own."""
    libvirtd = Path("/run/libvirtd.pid").read_text()
    subprocess.run(["nsenter", "--mount", "--target", libvirtd, *words], check=True, timeout=30)


@pytest.mark.only_mode(Mode.VM, "a VM pauses until there is space; in a container the write fails")
def test_a_full_disk_pauses_and_resume_goes_on_where_it_stood(
    host: Host, settings: Config, mode: Mode, running: Instance
) -> None:
    """The guest's disk moves to a small file system; what it writes beyond that waits for space, and is not lost."""
    layer = host.store.layer(running.record.layers[-1])
    assert run(settings, "stop", "--force", "running").status == 0
    disk = layer / "disk.qcow2"
    size_bytes = disk.stat().st_size + 8 * MIB
    mount = f"mount -t tmpfs -o mode=711,size={size_bytes} tmpfs {layer}"
    in_libvirtds_namespace("sh", "-c", f"cp {disk} /run/moved.qcow2; {mount}; mv /run/moved.qcow2 {disk}")
    try:
        assert run(settings, "start", "running").status == 0
        write = "head -c 40000000 /dev/urandom | tee /root/big | sha256sum > /root/sum; sync; touch /root/written"
        script = f"({write}) > /dev/null 2>&1 &"
        assert run(settings, "exec", "running", "--", "sh", "-c", script).status == 0
        deadline_s = time.monotonic() + 60
        while query.get(host, "running").state is not State.PAUSED and time.monotonic() < deadline_s:
            time.sleep(0.2)
        assert "full" in query.get(host, "running").live.cause
        assert "full" in run(settings, "show", "running").out
        in_libvirtds_namespace("mount", "-o", f"remount,size={size_bytes + 200 * MIB}", str(layer))
        assert run(settings, "resume", "running").status == 0
        check = "until [ -e /root/written ]; do sleep 0.2; done; sha256sum < /root/big | cmp - /root/sum"
        assert run(settings, "exec", "running", "--", "sh", "-c", check).status == 0
    finally:
        run(settings, "stop", "--force", "running")
        in_libvirtds_namespace("umount", str(layer))  # and it stays off: this test is the last of its mode
