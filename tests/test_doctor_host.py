"""The doctor on real file systems, networks and daemons: each failing side is made, and its fix tried where it is short."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvctl import doctor
from hvctl.config import Config
from hvctl.doctor import Verdict, cgroups, filesystem
from hvctl.doctor.finding import CHECKS, run_check
from hvctl.errors import HvctlError
from hvctl.host import Host
from hvctl.hostside import trials
from hvctl.model import Mode

pytestmark = pytest.mark.guest

REPOSITORY = Path(__file__).parent.parent
SUBNET = f"198.18.{secrets.randbelow(256)}"  # RFC 2544: for tests, routed nowhere
NETWORK_XML = """
<network>
  <name>{name}</name>
  <bridge name="{bridge}" stp="off"/>
  <ip address="{subnet}.1" prefix="24"><dhcp><range start="{subnet}.2" end="{subnet}.99"/></dhcp></ip>
</network>
"""
ALONE = """
import dataclasses, json, os, sys
from pathlib import Path
from hvctl.config import Config
from hvctl import doctor
from hvctl.doctor.finding import CHECKS, run_check
from hvctl.host import Host
uid, store, network, *names = sys.argv[1:]
os.setgroups([]); os.setgid(int(uid)); os.setuid(int(uid))
with Host(Config(store=Path(store), run=Path(store) / "run", network=network)) as host:
    print(json.dumps({check.name: dataclasses.asdict(run_check(check, host)) for check in CHECKS if check.name in names}))
"""


@pytest.fixture
def own_host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """A host with a store of its own that is set up, and a network name that nobody has; libvirt answers."""
    parent = Path(tempfile.mkdtemp(prefix="hvctl-test-doctor-", dir="/var/tmp"))
    parent.chmod(0o755)
    token = secrets.token_hex(3)
    with Host(Config(store=parent / "store", run=parent / "run", network=f"hvdoc{token}")) as host:
        try:
            host.connection(Mode.VM)
        except HvctlError:
            request.getfixturevalue("host")  # sets the machine up, daemons included
        store = host.store
        for path in (store.root, store.run, store.images, store.layers, store.instances, store.building, store.locks):
            path.mkdir(mode=0o711)
        yield host
    shutil.rmtree(parent)


@pytest.fixture
def with_network(own_host: Host) -> Iterator[Host]:
    """The same, and its network is defined but not active."""
    name = own_host.config.network
    handle = own_host.connection(Mode.VM).handle.networkDefineXML(
        NETWORK_XML.format(name=name, bridge=name, subnet=SUBNET)
    )
    yield own_host
    if handle.isActive():
        handle.destroy()
    handle.undefine()


def find(host: Host, name: str) -> doctor.Finding:
    return run_check(next(check for check in CHECKS if check.name == name), host)


def find_alone(host: Host, *names: str, before: tuple[str, ...] = (), uid: int = 0) -> dict[str, dict[str, str]]:
    """What checks find in a process of their own, as another user or put into other namespaces by `before`."""
    words = [*before, sys.executable, "-c", ALONE, str(uid), str(host.store.root), host.config.network, *names]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, str]] = json.loads(done.stdout)
    return found


def on_file_system(host: Host, options: str) -> tuple[str, ...]:
    """Puts another file system over the store, in a mount namespace of its own."""
    store = host.store.root
    script = f'mount -t {options} none {store}; exec "$@"'
    return "unshare", "--mount", "sh", "-ec", script, "-"


def list_world(host: Host) -> tuple[object, ...]:
    """Everything that a trial might leave: files and mounts."""
    mounts = Path("/proc/self/mountinfo").read_text()
    return sorted(host.store.root.parent.rglob("*")), mounts


def test_a_prepared_host_can_run_vms(with_network: Host) -> None:
    handle = with_network.connection(Mode.VM).handle.networkLookupByName(with_network.config.network)
    handle.create()
    before = list_world(with_network)
    begun_s = time.monotonic()
    findings = doctor.run(with_network)
    print(f"{len(findings)} checks in {time.monotonic() - begun_s:.2f} s")
    after = list_world(with_network)
    assert doctor.list_broken(findings) == ()
    kept = with_network.store.accelerator
    assert set(after[0]) - set(before[0]) <= {kept}  # type: ignore[call-overload]
    assert after[1:] == before[1:]


def test_a_parent_that_the_qemu_user_may_not_pass_is_named_and_its_fix_mends_it(own_host: Host) -> None:
    assert find(own_host, "way to the disks").verdict is Verdict.OK
    closed = own_host.store.root.parent
    closed.chmod(0o700)
    finding = find(own_host, "way to the disks")
    assert finding.verdict is Verdict.FAILED
    assert repr(str(closed)) in finding.reason
    assert finding.fix == f"chmod o+x {closed}"
    own_host.shell.run(["sh", "-c", finding.fix], timeout_s=10)
    assert find(own_host, "way to the disks").verdict is Verdict.OK


def test_a_missing_and_a_stopped_network_are_told_apart(with_network: Host) -> None:
    stranger = Host(dataclasses.replace(with_network.config, network="hvdoc-absent"))
    assert find(stranger, "network").reason == "libvirt has no network 'hvdoc-absent'"
    stopped = find(with_network, "network")
    assert (stopped.verdict, stopped.fix) == (Verdict.FAILED, "hvctl host setup")
    assert "is not active" in stopped.reason
    handle = with_network.connection(Mode.VM).handle.networkLookupByName(with_network.config.network)
    handle.create()
    assert find(with_network, "network").fix == f"virsh net-autostart {with_network.config.network}"
    assert find(with_network, "subnet").verdict is Verdict.OK


def test_a_subnet_that_another_link_has_is_a_clash(with_network: Host) -> None:
    """The link is in a network namespace of its own; libvirt's socket is reached from there all the same."""
    link = f"ip link add hvclash type bridge; ip address add {SUBNET}.200/25 dev hvclash; ip link set hvclash up"
    before = ("unshare", "--net", "sh", "-ec", f'{link}; exec "$@"', "-")
    found = find_alone(with_network, "subnet", before=before)["subnet"]
    assert found["verdict"] == "failed"
    assert f"{SUBNET}.0/24" in found["reason"]
    assert f"{SUBNET}.128/25 by 'hvclash'" in found["reason"]


def test_a_tiny_file_system_has_no_room(own_host: Host) -> None:
    found = find_alone(own_host, "disk space", before=on_file_system(own_host, "tmpfs -o size=20m"))["disk space"]
    assert found["verdict"] == "failed"
    assert found["reason"].startswith("20MiB of 20MiB are free")


def test_a_file_system_without_inodes_has_no_room(own_host: Host) -> None:
    found = find_alone(own_host, "disk space", before=on_file_system(own_host, "tmpfs -o size=10g,nr_inodes=50"))
    assert found["disk space"]["verdict"] == "failed"
    assert "inodes" in found["disk space"]["reason"]


def test_what_a_poor_file_system_cannot_do_is_found_out(own_host: Host) -> None:
    """ramfs keeps no attributes and takes part in no idmapped mount; it can rename without replacing."""
    names = ("extended attributes", "idmapped mounts", "publishing")
    found = find_alone(own_host, *names, before=on_file_system(own_host, "ramfs"))
    assert [found[name]["verdict"] for name in names] == ["warning", "warning", "ok"]
    assert "does not work in" in found["idmapped mounts"]["reason"]


def test_a_read_only_store_fails_and_says_why(own_host: Host) -> None:
    found = find_alone(own_host, "publishing", before=on_file_system(own_host, "tmpfs -o ro"))["publishing"]
    assert found["verdict"] == "failed"
    assert "Read-only file system" in found["reason"]


def test_a_trial_that_fails_leaves_nothing(own_host: Host) -> None:
    before = list_world(own_host)

    def break_off(directory: Path) -> str:
        (directory / "file").write_text("left over")
        trials.try_overlay(directory)
        raise OSError(5, "broken on purpose", str(directory))

    with pytest.raises(HvctlError, match="broken on purpose"):
        filesystem.try_on_store(own_host, break_off)
    assert list_world(own_host) == before


def test_the_hybrid_tree_is_found_in_the_daemon_s_own_namespace(
    own_host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A sleeping process stands for the daemon, once with our mounts and once with a version 2 tree put beside them."""
    monkeypatch.setattr(cgroups, "SYSTEMD", tmp_path / "absent")
    monkeypatch.setattr(cgroups, "PID_FILES", (tmp_path / "pid",))
    add = "mount -t tmpfs none /mnt && mkdir /mnt/1 /mnt/2 && mount -t cgroup2 none /mnt/2"
    take = "umount -R /sys/fs/cgroup"
    for script, verdict in ((f"{take}; {add}; {_v1()}", Verdict.WARNING), (f"{take}; {add}", Verdict.OK)):
        words = ["unshare", "--mount", "sh", "-c", f"{script}; echo; exec sleep 60"]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as daemon:
            assert daemon.stdout is not None
            daemon.stdout.readline()
            (tmp_path / "pid").write_text(f"{daemon.pid}\n")
            finding = find(own_host, "cgroups as libvirt sees them")
            daemon.kill()
        assert finding.verdict is verdict, finding
        assert f"process {daemon.pid}" in finding.reason


def _v1() -> str:
    """A version 1 hierarchy with a controller that is not in the version 2 tree of this host."""
    held = Path("/proc/self/cgroup").read_text()
    name = next((line.split(":")[1] for line in held.splitlines() if line.split(":")[1] in ("pids", "memory")), "")
    if not name:
        pytest.skip("every controller of this host is in the version 2 tree")
    return f"mount -t cgroup -o {name} none /mnt/1"


def test_nobody_is_not_told_that_the_host_is_broken(own_host: Host) -> None:
    names = ("overlay", "idmapped mounts", "way to the disks", "virtlogd")
    found = find_alone(own_host, *names, "disk space", uid=65534)
    assert {found[name]["verdict"] for name in ("overlay", "idmapped mounts", "virtlogd")} == {"not applicable"}
    assert found["disk space"]["verdict"] in ("ok", "warning")
