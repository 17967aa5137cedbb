"""Setting a host up and taking that back: a second store and network beside the one the other tests use."""

from __future__ import annotations

import functools
import ipaddress
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import libvirt
import pytest

from hvctl import hostsetup
from hvctl.config import Config
from hvctl.errors import WrongState
from hvctl.host import Host
from hvctl.hostsetup import hooks, network
from hvctl.hostside import daemons, filters
from hvctl.instances import create, lifecycle
from hvctl.libvirtapi import networks, survey
from hvctl.model import Mode
from tests import tiny
from tests.cli import run

pytestmark = pytest.mark.guest


@pytest.fixture
def bare(host: Host, settings: Config, tmp_path: Path) -> Iterator[Host]:
    """A host whose daemons run, and where nothing of this store and network is there."""
    name = f"{settings.network}b"
    with Host(replace(settings, store=tmp_path / "store", run=tmp_path / "run", network=name)) as other:
        yield other
        hostsetup.teardown(other)


def look(host: Host) -> dict[str, object]:
    """What setup touches."""
    nft = subprocess.run(
        ["nft", "-s", "list", "ruleset"], capture_output=True, text=True, timeout=10, check=True
    ).stdout
    folders = (Path("/etc/libvirt/hooks"), filters.NETWORKS.parent, host.store.root, host.store.run)
    return {
        "networks": sorted(item.name() for item in host.connection(Mode.VM).handle.listAllNetworks()),
        "links": sorted(path.name for path in Path("/sys/class/net").iterdir() if not path.name.startswith("hv")),
        "files": sorted((str(path), path.stat().st_mode) for folder in folders for path in folder.rglob("*")),
        "nft": [line for line in nft.splitlines() if "elements" not in line and "hv" in line],
    }


def test_a_dry_run_changes_nothing_and_says_everything(bare: Host) -> None:
    before = look(bare)
    said = hostsetup.setup(bare, dry_run=True)
    assert look(bare) == before
    assert any("create directory" in change.text for change in said)
    assert any("define the network" in change.text for change in said)


def test_a_second_run_finds_nothing_to_do_and_teardown_takes_it_all_back(bare: Host) -> None:
    before = look(bare)
    assert hostsetup.setup(bare)
    assert hostsetup.setup(bare) == ()
    assert (bare.store.root.stat().st_mode & 0o7777, bare.store.building.stat().st_mode & 0o7777) == (0o711, 0o700)
    assert bare.store.locks.stat().st_mode & 0o7777 == 0o2770
    hostsetup.teardown(bare)
    assert look(bare) == before
    assert hostsetup.teardown(bare) == ()


def test_the_network_is_as_designed(bare: Host) -> None:
    hostsetup.setup(bare)
    name = bare.config.network
    facts = survey.find_network(bare.connection(Mode.VM), name)
    assert facts is not None
    assert (facts.is_active, facts.is_autostart, facts.has_dhcp) == (True, True, True)
    bridge = Path("/sys/class/net", facts.bridge, "bridge")
    assert (bridge / "stp_state").read_text().strip() == "0"
    assert (bridge / "forward_delay").read_text().strip() == "0"
    assert str(facts.subnets[0]) in filters.subnets()


def test_a_subnet_that_somebody_routes_is_not_chosen(bare: Host) -> None:
    """All of 10/8 but one /24 is somebody else's: that one is found, or none."""
    link = "br-hvtestroute"
    subprocess.run(["ip", "link", "add", link, "type", "bridge"], check=True, timeout=10)
    try:
        subprocess.run(["ip", "link", "set", link, "up"], check=True, timeout=10)
        subprocess.run(["ip", "route", "add", "10.0.0.0/9", "dev", link], check=True, timeout=10)
        assert all(int(str(network.choose_subnet(bare)).split(".")[1]) >= 128 for _try in range(50))
    finally:
        subprocess.run(["ip", "link", "del", link], check=True, timeout=10)


def test_teardown_is_refused_while_there_are_instances(bare: Host) -> None:
    hostsetup.setup(bare)
    tiny.publish(bare, "tiny")
    create.create(bare, create.Request(spec=tiny.make_spec("inhabitant"), start=False))
    with pytest.raises(WrongState, match="inhabitant"):
        hostsetup.teardown(bare)
    nowhere = replace(bare.config, vm_uri="qemu+unix:///system?socket=/nosuch/socket")
    with Host(nowhere) as mute, pytest.raises(WrongState, match="still has instances"):
        hostsetup.teardown(mute)  # nor when libvirt cannot say whose they are
    lifecycle.delete(bare, "inhabitant")


def test_data_survives_teardown(bare: Host) -> None:
    hostsetup.setup(bare)
    tiny.publish(bare, "tiny")
    hostsetup.teardown(bare)
    assert (bare.store.tags / "tiny").exists()
    assert not bare.store.layers.exists()


def test_an_address_whose_lease_runs_is_not_given_to_another(host: Host) -> None:
    """Reservations are unique, go round the range, and are given back by MAC alone."""
    connection, name = host.connection(Mode.VM), host.config.network
    first = networks.reserve(connection, name, name="one", mac="52:00:00:00:00:01")
    second = networks.reserve(connection, name, name="two", mac="52:00:00:00:00:02")
    assert networks.reserve(connection, name, name="one", mac="52:00:00:00:00:01") == first
    assert first != second
    third = networks.reserve(connection, name, name="three", mac="52:00:00:00:00:03", after=second)
    assert int(ipaddress.IPv4Address(third)) > int(ipaddress.IPv4Address(second))
    networks.release(connection, name, mac="52:00:00:00:00:03")
    last = second.rpartition(".")[0] + ".254"
    assert networks.reserve(connection, name, name="three", mac="52:00:00:00:00:03", after=last) not in (first, second)
    networks.release(connection, name, mac="52:00:00:00:00:03")
    networks.release(connection, name, mac="52:00:00:00:00:01")
    networks.release(connection, name, mac="52:00:00:00:00:01")
    assert [item.mac for item in networks.list_reservations(connection, name)].count("52:00:00:00:00:02") == 1
    networks.release(connection, name, mac="52:00:00:00:00:02")


def test_who_asks_for_no_lease_has_a_name_whatever_was_interrupted(host: Host) -> None:
    connection, network, mac = host.connection(Mode.VM), host.config.network, "52:00:00:00:00:04"

    def names() -> list[str]:
        return re.findall("<hostname>(.*)</hostname>", networks.read_definition(connection, network))

    keep = functools.partial(networks.reserve, connection, network, name="one", mac=mac, asks_for_lease=False)
    address = keep()
    entry = f"<host ip='{address}'><hostname>one</hostname></host>"
    forget = functools.partial(
        networks.get(connection, network).update,
        libvirt.VIR_NETWORK_UPDATE_COMMAND_DELETE, libvirt.VIR_NETWORK_SECTION_DNS_HOST, -1, entry,
        libvirt.VIR_NETWORK_UPDATE_AFFECT_CONFIG | libvirt.VIR_NETWORK_UPDATE_AFFECT_LIVE,
    )  # fmt: skip
    assert names() == ["one"]
    forget()
    assert (keep(), names()) == (address, ["one"])
    forget()
    networks.rename_reservation(connection, network, mac=mac, name="two", asks_for_lease=False)
    assert names() == ["two"]
    networks.release(connection, network, mac=mac)
    assert names() == []


def test_the_command_says_when_there_is_nothing_to_do(settings: Config, host: Host) -> None:
    done = run(settings, "host", "setup")
    assert (done.status, done.out) == (0, "this host is set up already\n"), done


def test_a_daemon_is_told_from_its_children(host: Host) -> None:
    assert daemons.find_running("libvirtd") == int(Path("/run/libvirtd.pid").read_text())
    assert daemons.find_running("no-such-daemon") == 0


@pytest.mark.apart
def test_code_that_a_hook_still_runs_is_not_taken_from_it(tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    script = 'echo begun; sleep 0.5; [ -d "$1" ] && echo there'
    with subprocess.Popen(["sh", "-c", script, str(hooks.HOOKS[0]), str(code)], stdout=subprocess.PIPE) as hook:
        assert hook.stdout and hook.stdout.readline() == b"begun\n"
        hooks._remove_unused(code)
        assert hook.communicate()[0] == b"there\n"
    assert not code.exists()


@pytest.mark.apart
def test_a_daemon_that_has_ended_is_not_waited_for_by_whoever_started_it() -> None:
    """lxcfs is a child of the process that sets a host up: until that asks for it, its number stays."""
    with subprocess.Popen(["sleep", "60"]) as child:
        assert daemons._start_time(child.pid)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert Path(f"/proc/{child.pid}/stat").exists()
        assert daemons._start_time(child.pid) == ""


_PIN = """
import os, pathlib, subprocess, sys
from hvctl.hostside import daemons
os.sched_setaffinity(0, {int(cpu) for cpu in sys.argv[1:]})
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=True)
daemons.NAMESPACE = pathlib.Path("/mnt/namespaces/libvirtd")
daemons._make_pin()
for _time in range(10):
    daemons._run_pinned("grep Cpus_allowed_list /proc/self/status >> /mnt/seen")
    subprocess.run(["umount", daemons.NAMESPACE], check=True)
own = pathlib.Path("/proc/self/status").read_text()
assert {line in own for line in open("/mnt/seen")} == {True}, "it runs on fewer CPUs than we"
"""


@pytest.mark.apart
def test_libvirtds_namespace_is_pinned_whichever_cpu_has_numbered_ours() -> None:
    cpus = [str(cpu) for cpu in os.sched_getaffinity(0)]
    for cpu in cpus:
        words = ["taskset", "--cpu-list", cpu, "unshare", "--mount", sys.executable, "-c", _PIN, *cpus]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
