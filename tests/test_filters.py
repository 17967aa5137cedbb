"""The packet filter against real frames: three ports of a bridge in network namespaces of this test's own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvctl.hostside import filters
from tests import frames

MINE = filters.Guest("hv00000000aa", "52:00:00:00:00:aa", "10.99.0.10")
OTHER = filters.Guest("hv00000000bb", "52:00:00:00:00:bb", "10.99.0.11")
SUBNET = "10.99.0.0/24"

# What a guest may send: it is let through. Each is (name, frame).
HONEST = {
    "arp request": frames.arp(MINE.mac, MINE.mac, MINE.address, OTHER.address),
    "arp probe": frames.arp(MINE.mac, MINE.mac, "0.0.0.0", MINE.address),
    "ipv4": frames.udp(MINE.mac, MINE.address, OTHER.address, 4000, 5000),
    "dhcp discover": frames.udp(MINE.mac, "0.0.0.0", "255.255.255.255", 68, 67, frames.dhcp(MINE.mac)),
    "a large packet in fragments": frames.first_fragment(
        frames.udp(MINE.mac, MINE.address, OTHER.address, 4000, 5000, bytes(64)), 48
    ),
    "dhcp renewal": frames.udp(MINE.mac, MINE.address, "10.99.0.1", 68, 67, frames.dhcp(MINE.mac)),
}
# What it may not: nobody must ever see it.
FORGED = {
    "another's mac": frames.udp(OTHER.mac, MINE.address, OTHER.address, 4000, 5000),
    "arp from another's mac": frames.arp(OTHER.mac, MINE.mac, MINE.address, OTHER.address),
    "another's ipv4 address": frames.udp(MINE.mac, OTHER.address, "10.99.0.1", 4000, 5000),
    "the host's ipv4 address": frames.udp(MINE.mac, "10.99.0.1", OTHER.address, 4000, 5000),
    "no ipv4 address outside dhcp": frames.udp(MINE.mac, "0.0.0.0", OTHER.address, 4000, 5000),
    "arp for another's address": frames.arp(MINE.mac, MINE.mac, OTHER.address, OTHER.address, is_reply=True),
    "arp for the gateway": frames.arp(MINE.mac, MINE.mac, "10.99.0.1", "10.99.0.1", is_reply=True),
    "arp with another's mac inside": frames.arp(MINE.mac, OTHER.mac, MINE.address, OTHER.address, is_reply=True),
    "dhcp server": frames.udp(MINE.mac, MINE.address, "255.255.255.255", 67, 68, frames.dhcp(OTHER.mac, is_reply=True)),
    "dhcp in another's name": frames.udp(MINE.mac, "0.0.0.0", "255.255.255.255", 68, 67, frames.dhcp(OTHER.mac)),
    "release of another's lease": frames.udp(MINE.mac, MINE.address, "10.99.0.1", 68, 67, frames.dhcp(OTHER.mac)),
    "dhcp in fragments": frames.first_fragment(
        frames.udp(MINE.mac, MINE.address, "10.99.0.1", 68, 67, frames.dhcp(OTHER.mac)), 32
    ),
    "router advertisement": frames.router_advertisement(MINE.mac),
    "a tagged frame": frames.tagged(frames.udp(MINE.mac, OTHER.address, "10.99.0.1", 4000, 5000)),
    "a bridge protocol frame": frames.spanning_tree(MINE.mac),
}


@pytest.fixture(scope="module")
def bridged() -> Iterator[frames.Lab]:
    """A bridge with two guests' ports and the tables for both, all in a network namespace of its own."""
    with frames.lab(f"hvctl-test-{MINE.device}", (MINE.device, OTHER.device)) as made:
        # Else the kernel puts fragments together on the way where the module br_netfilter is loaded.
        setting = "net.bridge.bridge-nf-call-iptables=0"
        subprocess.run(["ip", "netns", "exec", made.name, "sysctl", "-qw", setting], check=False, capture_output=True)
        made.load(filters.render([MINE, OTHER], [SUBNET]))
        yield made


@pytest.mark.apart
@pytest.mark.guest
@pytest.mark.parametrize("name", HONEST)
def test_a_guest_speaks_as_itself(bridged: frames.Lab, name: str) -> None:
    assert bridged.arrives(MINE.device, HONEST[name], OTHER.device)


@pytest.mark.apart
@pytest.mark.guest
@pytest.mark.parametrize("name", FORGED)
def test_a_guest_cannot_send(bridged: frames.Lab, name: str) -> None:
    honest = HONEST["ipv4"]  # sent after the forged frame, so that "nothing came" is not just "nothing yet"
    assert bridged.received(MINE.device, [FORGED[name], honest], OTHER.device) == [honest]


@pytest.mark.apart
@pytest.mark.guest
def test_without_the_tables_forged_frames_do_arrive(bridged: frames.Lab) -> None:
    """The control: it is the filter that stops them, not the way they are sent."""
    bridged.load("delete table bridge hvctl; delete table ip hvctl")
    try:
        for name, frame in FORGED.items():
            assert name == "a bridge protocol frame" or bridged.arrives(MINE.device, frame, OTHER.device), name
    finally:
        bridged.load(filters.render([MINE, OTHER], [SUBNET]))


@pytest.mark.apart
@pytest.mark.guest
def test_a_port_that_is_nobodys_is_left_alone(bridged: frames.Lab) -> None:
    bridged.load(filters.render([OTHER], [SUBNET]))
    try:
        assert bridged.arrives(MINE.device, FORGED["another's mac"], OTHER.device)
    finally:
        bridged.load(filters.render([MINE, OTHER], [SUBNET]))


@pytest.mark.parametrize(
    ("device", "mac", "address"),
    [
        ("eth0", MINE.mac, MINE.address),
        (f'{MINE.device}"; flush ruleset; #', MINE.mac, MINE.address),
        (MINE.device, f"{MINE.mac} }}; flush ruleset", MINE.address),
        (MINE.device, MINE.mac.upper(), MINE.address),
        (MINE.device, MINE.mac, "10.0.0.1 }; flush ruleset"),
        (MINE.device, MINE.mac, ""),
    ],
)
def test_nothing_but_an_interface_a_mac_and_an_address_reaches_nft(device: str, mac: str, address: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        filters.Guest(device, mac, address)


def hook(operation: str, definition: str, path: str) -> subprocess.CompletedProcess[str]:
    """Run the hook as libvirt does, in a network namespace of its own, with guests kept in `path`."""
    script = (
        "import pathlib, sys; from hvctl.hostside import filters, hook; "
        "filters.GUESTS = pathlib.Path(sys.argv.pop()); hook.main(sys.argv)"
    )
    argv = ["unshare", "--net", "sh", "-c", '"$0" "$@"; code=$?; nft -j list ruleset; exit $code']
    argv += [sys.executable, "-c", script, "web", *operation.split(), "-", path]
    return subprocess.run(argv, input=definition, capture_output=True, text=True, timeout=60, check=False)


def definition(address: str) -> str:
    return f"""<domain type="qemu"><name>web</name><metadata>
        <hvctl:instance xmlns:hvctl="urn:hvctl" schema="1">
          <hvctl:interface network="hvctl" mac="{MINE.mac}" address="{address}" device="{MINE.device}"/>
        </hvctl:instance></metadata></domain>"""


@pytest.mark.apart
@pytest.mark.guest
def test_the_hook_admits_before_the_start_and_dismisses_after_the_end(tmp_path: Path) -> None:
    guests = tmp_path / "guests"
    started = hook("prepare begin", definition(MINE.address), str(guests))
    assert (started.returncode, started.stderr) == (0, "")
    assert MINE.address in json.dumps(json.loads(started.stdout))
    assert (guests / MINE.device).read_text() == f"{MINE.mac} {MINE.address}\n"
    again = hook("prepare begin", definition(MINE.address), str(guests))
    assert again.stdout == started.stdout
    ended = hook("release end", definition(MINE.address), str(guests))
    assert ended.returncode == 0
    assert list(guests.iterdir()) == []
    assert MINE.address not in ended.stdout


@pytest.mark.apart
@pytest.mark.guest
def test_a_start_brings_back_every_guest_of_a_flushed_ruleset(tmp_path: Path) -> None:
    """Each call has a fresh network namespace, which is a ruleset that was flushed."""
    guests = tmp_path / "guests"
    guests.mkdir()
    (guests / OTHER.device).write_text(f"{OTHER.mac} {OTHER.address}\n")
    started = hook("prepare begin", definition(MINE.address), str(guests))
    assert MINE.address in started.stdout
    assert OTHER.address in started.stdout


def admit_in_turn(tmp_path: Path, *steps: str) -> list[str]:
    """Admit guests (`DEVICE MAC ADDRESS`) or run lines of shell or Python, in one network namespace; the rules after each."""
    script = (
        "import pathlib, subprocess, sys, textwrap; from hvctl.hostside import filters, nftables\n"
        "filters.GUESTS, filters.NETWORKS = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1] + '.networks')\n"
        "for step in sys.argv[2:]:\n"
        "    if step.startswith('hv'): filters.admit(filters.Guest(*step.split()))\n"
        "    elif step.startswith('python:'): exec(textwrap.dedent(step.removeprefix('python:')))\n"
        "    else: subprocess.run(step, shell=True, check=True)\n"
        "    said = subprocess.run(['nft', '-a', 'list', 'ruleset'], capture_output=True, text=True, check=True)\n"
        "    print(said.stdout, end='\\0')"
    )
    tmp_path.mkdir(exist_ok=True)
    argv = ["unshare", "--net", sys.executable, "-c", script, str(tmp_path / "guests"), *steps]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.split("\0")[:-1]


def handle_of(rules: str) -> str:
    """The kernel's number of our table: another one when the table was replaced."""
    return re.findall(r"table bridge hvctl { # handle (\d+)", rules)[0]


def words_of(rules: str) -> list[str]:
    """In some order, as the kernel keeps elements in none, without the numbers that it gives."""
    return sorted(re.sub(r"# handle \d+|,", "", rules).split())


THIRD = filters.Guest("hv00000000cc", "52:00:00:00:00:cc", "10.99.0.12")
MINE_WORDS, OTHER_WORDS, THIRD_WORDS = (f"{guest.device} {guest.mac} {guest.address}" for guest in (MINE, OTHER, THIRD))


@pytest.mark.apart
@pytest.mark.guest
def test_where_no_rule_has_changed_a_guest_is_only_added(tmp_path: Path) -> None:
    first, second, again = admit_in_turn(tmp_path, MINE_WORDS, OTHER_WORDS, OTHER_WORDS)
    assert (handle_of(second), again) == (handle_of(first), second)
    _first, _flushed, written_whole = admit_in_turn(tmp_path, MINE_WORDS, "nft flush ruleset", OTHER_WORDS)
    assert words_of(second) == words_of(written_whole)


@pytest.mark.apart
@pytest.mark.guest
@pytest.mark.parametrize(
    "harm",
    [
        "nft flush ruleset",
        "nft flush chain bridge hvctl from_guests",
        "nft flush set bridge hvctl macs",
        "nft delete table ip hvctl",
        "nft add table ip somebody",
    ],
)
def test_where_a_rule_has_changed_a_start_writes_all_anew(tmp_path: Path, harm: str) -> None:
    first, _harmed, last = admit_in_turn(tmp_path, MINE_WORDS, harm, OTHER_WORDS)
    assert handle_of(last) != handle_of(first)
    _first, written_whole = admit_in_turn(tmp_path / "anew", MINE_WORDS, OTHER_WORDS)
    assert set(words_of(written_whole)) <= set(words_of(last))


# Once, right after the rules were looked at; or by each nft that is started, before it does what it is to do.
HARM_WHEN_LOOKED = """python:
    looked = nftables.find_generation
    def harm():
        nftables.find_generation, seen = looked, looked()
        subprocess.run(["nft", *{harm!r}.split()], check=True)
        return seen
    nftables.find_generation = harm"""
HARM_BEFORE_NFT = """python:
    wrapper = pathlib.Path(sys.argv[1] + ".nft")
    wrapper.write_text('#!/bin/sh\\nnft {harm}; exec nft "$@"\\n')
    wrapper.chmod(0o700)
    found, nftables._find_program = nftables._find_program, lambda: str(wrapper)"""


@pytest.mark.apart
@pytest.mark.guest
@pytest.mark.parametrize("harm", ["flush ruleset", "flush chain bridge hvctl from_guests", "delete table ip hvctl"])
@pytest.mark.parametrize(
    ("begin", "end"),
    [(HARM_WHEN_LOOKED, "true"), (HARM_BEFORE_NFT, "python:nftables._find_program = found")],
    ids=["looked", "before nft"],
)
def test_rules_that_change_while_a_guest_is_added_are_all_there_after_the_next(
    tmp_path: Path, harm: str, begin: str, end: str
) -> None:
    steps = (MINE_WORDS, begin.format(harm=harm), OTHER_WORDS, end, THIRD_WORDS)
    *_before, last = admit_in_turn(tmp_path, *steps)
    *_before, written_whole = admit_in_turn(tmp_path / "anew", MINE_WORDS, OTHER_WORDS, THIRD_WORDS)
    assert words_of(last) == words_of(written_whole)


@pytest.mark.apart
@pytest.mark.guest
def test_the_rules_of_another_namespace_or_boot_are_not_taken_for_ours(tmp_path: Path) -> None:
    """Each begins to count anew, and what is known of guests may outlive it."""
    for _namespace in range(2):
        (rules,) = admit_in_turn(tmp_path, MINE_WORDS)
        assert MINE.address in rules
    assert (
        (tmp_path / "guests.state").read_text().startswith(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    )


@pytest.mark.apart
@pytest.mark.guest
def test_a_guest_that_is_forgotten_halfway_is_not_let_in_for_long(tmp_path: Path) -> None:
    """Killed in the middle: the next start of any guest writes what is known, and no more."""
    kill = f"python:filters._load = lambda: None; filters.dismiss(filters.Guest(*{MINE_WORDS!r}.split()))"
    *_before, last = admit_in_turn(tmp_path, MINE_WORDS, OTHER_WORDS, kill, THIRD_WORDS)
    assert OTHER.address in last and MINE.address not in last


@pytest.mark.apart
@pytest.mark.guest
def test_an_interface_that_gets_another_address_keeps_only_that_one(tmp_path: Path) -> None:
    _first, last = admit_in_turn(tmp_path, MINE_WORDS, f"{MINE.device} {MINE.mac} 10.99.0.77")
    assert "10.99.0.77" in last
    assert MINE.address not in last


@pytest.mark.apart
@pytest.mark.guest
@pytest.mark.parametrize(("operation", "code"), [("prepare begin", 1), ("reconnect begin", 0), ("release end", 0)])
def test_a_failing_hook_refuses_only_a_start(tmp_path: Path, operation: str, code: int) -> None:
    done = hook(operation, definition("no address"), str(tmp_path / "guests"))
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == 1
    assert "'web'" in done.stderr


@pytest.mark.apart
@pytest.mark.guest
def test_a_root_is_unmounted_whatever_becomes_of_the_filter(tmp_path: Path) -> None:
    uuid = "6a3c7c2e-0000-4000-8000-000000000001"
    root = tmp_path / "instances" / uuid / "root"
    root.mkdir(parents=True)
    (tmp_path / "file").touch()
    record = f"""<domain type="lxc"><name>web</name><uuid>{uuid}</uuid><metadata>
        <hvctl:instance xmlns:hvctl="urn:hvctl" schema="1" store="{tmp_path}">
          <hvctl:interface network="hvctl" mac="{MINE.mac}" address="{MINE.address}" device="{MINE.device}"/>
          <hvctl:container first-id="1879048192"/><hvctl:root image="none"/><hvctl:spec/>
        </hvctl:instance></metadata></domain>"""
    script = (
        "import pathlib, sys; from hvctl.hostside import filters, hook; "
        "filters.GUESTS = pathlib.Path(sys.argv.pop()); hook.main(sys.argv)"
    )
    around = 'mount -t tmpfs none "$ROOT" && "$0" "$@"; code=$?; mountpoint -q "$ROOT" && echo mounted; exit $code'
    words = [sys.executable, "-c", script, "web", "release", "end", "-", str(tmp_path / "file" / "guests")]
    argv = ["unshare", "--net", "--mount", "sh", "-c", around, *words]
    variables = {**os.environ, "ROOT": str(root)}
    done = subprocess.run(argv, input=record, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert "Not a directory" in done.stderr
    assert done.stdout == "", done


@pytest.mark.parametrize("operation", ["prepare begin", "start begin", "reconnect begin", "release end"])
def test_the_hook_leaves_others_domains_alone(tmp_path: Path, operation: str) -> None:
    script = "import sys; from hvctl.hostside import hook; hook.main(sys.argv); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script, "web", *operation.split(), "-"],
        input="<domain/>", capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "hvctl.hostside.filters" not in done.stdout.split()


@pytest.fixture(scope="module")
def routed() -> Iterator[frames.Lab]:
    """The bridge's namespace as a router between a guest (10.99.0.10) and somebody outside (192.0.2.2)."""
    with frames.lab("hvctl-test-router", (MINE.device, "outside")) as made:
        made.address(MINE.device, f"{MINE.address}/24", "10.99.0.1/24")
        made.address("outside", "192.0.2.2/24", "192.0.2.1/24")
        made.load(filters.render([], [SUBNET]))
        yield made


@pytest.mark.apart
@pytest.mark.guest
def test_a_guest_reaches_the_outside_by_the_hosts_address(routed: frames.Lab) -> None:
    assert routed.ask(MINE.device, "192.0.2.2", "outside") == "192.0.2.1"


@pytest.mark.apart
@pytest.mark.guest
def test_nobody_outside_reaches_a_guest(routed: frames.Lab) -> None:
    assert routed.ask("outside", MINE.address, MINE.device) == ""
    routed.load("flush chain ip hvctl entering")  # the control: but for that rule, it would
    assert routed.ask("outside", MINE.address, MINE.device) == "192.0.2.2"
