"""The doctor's judgement, and its failing sides as far as they need neither root nor libvirtd."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvctl import doctor
from hvctl.cli.app import App
from hvctl.cli.doctor import doctor as command
from hvctl.config import Config
from hvctl.doctor import Verdict, cgroups, confinement, daemons, network, storage, versions
from hvctl.doctor.finding import CHECKS, Check, Outcome, ok, run_check
from hvctl.errors import HostError
from hvctl.host import Host
from hvctl.libvirtapi.survey import NetworkFacts


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Host]:
    """A host that was never set up, where nobody answers for libvirt."""
    nobody = f"system?socket={tmp_path}/nobody"
    with Host(
        Config(
            store=tmp_path / "store",
            run=tmp_path / "run",
            vm_uri=f"qemu+unix:///{nobody}",
            container_uri=f"lxc+unix:///{nobody}",
        )
    ) as host:
        yield host


def find(host: Host, name: str) -> doctor.Finding:
    """What one check finds."""
    return run_check(next(check for check in CHECKS if check.name == name), host)


def test_every_check_has_a_name_of_its_own_and_a_sentence() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert [check.name for check in CHECKS if not (check.function.__doc__ or "").strip().endswith(".")] == []


def test_a_check_that_raises_is_a_failed_finding(bare: Host) -> None:
    def refuse(host: Host) -> Outcome:
        raise HostError("nothing works\nat all", hint="try this")

    def miss(host: Host) -> Outcome:
        return ok(Path("/nonexistent").read_text())

    finding = run_check(Check(name="a", function=refuse, is_vital=True), bare)
    assert (finding.verdict, finding.reason, finding.fix) == (Verdict.FAILED, "nothing works at all", "try this")
    finding = run_check(Check(name="b", function=miss, is_vital=False), bare)
    assert (finding.verdict, finding.reason) == (Verdict.FAILED, "/nonexistent: No such file or directory")


def test_without_libvirt_all_other_checks_are_still_made(bare: Host, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    findings = {finding.name: finding for finding in doctor.run(bare)}
    assert set(findings) == {check.name for check in CHECKS}
    assert findings["libvirt"].verdict is Verdict.FAILED
    assert findings["libvirt"].fix == ("hvctl host setup" if os.geteuid() == 0 else "run it as root")
    assert findings["network"].verdict is Verdict.NOT_APPLICABLE
    assert findings["disk space"].verdict in (Verdict.OK, Verdict.WARNING)
    assert findings["store"].verdict is Verdict.FAILED
    assert "libvirt" in [finding.name for finding in doctor.list_broken(findings.values())]
    assert not doctor.can_run_vms(findings.values())
    assert sorted(tmp_path.rglob("*")) == before


def test_only_a_failed_vital_check_keeps_vms_from_running() -> None:
    def finding(verdict: Verdict, *, is_vital: bool) -> doctor.Finding:
        return doctor.Finding(name="x", verdict=verdict, reason="", fix="", is_vital=is_vital)

    assert doctor.can_run_vms([finding(verdict, is_vital=False) for verdict in Verdict])
    assert doctor.can_run_vms([finding(verdict, is_vital=True) for verdict in Verdict if verdict != Verdict.FAILED])
    assert not doctor.can_run_vms([finding(Verdict.FAILED, is_vital=True)])


def test_the_command_exits_with_8_and_prints_what_programs_can_read(
    bare: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    app = App()
    app._host = bare
    with pytest.raises(HostError) as raised:
        command.main(args=["--json"], obj=app, standalone_mode=False)
    assert raised.value.code == 8
    assert raised.value.message.startswith("no VM can run on this host: ")
    printed = json.loads(capsys.readouterr().out)
    assert printed["can_run_vms"] is False
    assert set(printed["findings"][0]) == {"name", "verdict", "reason", "fix", "is_vital"}


def test_a_pipe_gets_the_table_without_colour(bare: Host, capsys: pytest.CaptureFixture[str]) -> None:
    app = App()
    app._host = bare
    with pytest.raises(HostError):
        command.main(args=[], obj=app, standalone_mode=False)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == ["VERDICT", "CHECK", "REASON", "FIX"]
    assert "\x1b" not in printed


def test_without_ssh_keygen_no_instance_can_be_made(
    bare: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find(bare, "ssh").verdict is Verdict.OK
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = find(bare, "ssh")
    assert (finding.verdict, finding.fix, finding.is_vital) == (Verdict.FAILED, "apt-get install openssh-client", True)


def test_a_dnsmasq_that_cannot_be_told_to_forget_is_warned_of(
    bare: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert find(bare, "dnsmasq").verdict is Verdict.OK
    (tmp_path / "dnsmasq").symlink_to("/usr/sbin/dnsmasq")
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = find(bare, "dnsmasq")
    assert (finding.verdict, finding.fix) == (Verdict.WARNING, "apt-get install dnsmasq-utils")


@pytest.mark.parametrize("name", ["qemu", "accelerator"])
def test_a_program_that_is_missing_is_named(
    bare: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = find(bare, name)
    assert finding.verdict is Verdict.FAILED
    assert "'qemu-system-x86_64' is not installed" in finding.reason
    assert "apt-get install" in finding.fix


def test_a_store_that_others_can_write_to_is_refused_and_its_fix_mends_it(bare: Host) -> None:
    store = bare.store
    assert find(bare, "store").fix == "hvctl host setup"
    for path in (store.images, store.layers, store.instances, store.building, store.locks):
        path.mkdir(parents=True, mode=0o711)
    store.layers.chmod(0o777)
    finding = find(bare, "store")
    assert finding.verdict is Verdict.FAILED
    if os.geteuid() == 0:
        assert f"{str(store.layers)!r} belongs to root:root with mode 0777" in finding.reason
        bare.shell.run(["sh", "-c", finding.fix], timeout_s=10)
        assert find(bare, "store").verdict is Verdict.OK


def test_little_space_is_a_warning_and_none_a_failure(bare: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(bare, "disk space").verdict is not Verdict.FAILED
    monkeypatch.setattr(storage, "COMFORTABLE_BYTES", 2**60)
    assert find(bare, "disk space").verdict is Verdict.WARNING
    monkeypatch.setattr(storage, "LEAST_BYTES", 2**60)
    assert find(bare, "disk space").verdict is Verdict.FAILED


@pytest.mark.parametrize(
    ("mode", "group", "authorisation", "verdict", "says"),
    [
        (0o777, "root", "polkit", Verdict.OK, "polkit decides"),
        (0o777, "root", "none", Verdict.FAILED, "every local user is as good as root"),
        (0o770, "libvirt", "none", Verdict.OK, "group libvirt"),
        (0o700, "root", "none", Verdict.OK, "for root alone"),
    ],
)
def test_who_may_speak_to_libvirt(mode: int, group: str, authorisation: str, verdict: Verdict, says: str) -> None:
    outcome = daemons.judge_socket(Path("/run/x"), (mode, "root", group), authorisation, is_root=True)
    assert outcome.verdict is verdict
    assert says in outcome.reason


def test_a_user_outside_the_group_is_told_to_join_it(tmp_path: Path) -> None:
    absent = tmp_path / "socket"  # what is not there cannot be written to, by root neither
    outcome = daemons.judge_socket(absent, (0o770, "root", "libvirt"), "none", is_root=False)
    assert outcome.verdict is Verdict.FAILED
    assert outcome.fix.startswith("usermod -aG libvirt ")


def test_a_log_daemon_is_there_when_somebody_listens(
    bare: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        assert find(bare, "virtlogd").verdict is Verdict.NOT_APPLICABLE
        return
    path = tmp_path / "sock"
    monkeypatch.setattr(daemons, "LOG_SOCKET", path)
    monkeypatch.setattr(daemons, "CONFIGURATION", tmp_path)
    assert find(bare, "virtlogd").verdict is Verdict.FAILED
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert find(bare, "virtlogd").verdict is Verdict.FAILED
        listener.listen()
        assert find(bare, "virtlogd").verdict is Verdict.OK


@pytest.mark.parametrize(
    ("listing", "verdict", "fix"),
    [
        ("libvirtd (enforce)\nlibvirtd//qemu_bridge_helper (enforce)\nvirt-aa-helper (enforce)\n", Verdict.OK, ""),
        ("/usr/sbin/libvirtd (enforce)\n/usr/lib/libvirt/virt-aa-helper (enforce)\n", Verdict.OK, ""),
        (
            "libvirtd (complain)\nvirt-aa-helper (enforce)\n",
            Verdict.WARNING,
            "aa-enforce /etc/apparmor.d/usr.sbin.libvirtd",
        ),
        (
            "libvirtd (enforce)\nnvidia (enforce)\n",
            Verdict.WARNING,
            "apparmor_parser -r /etc/apparmor.d/usr.lib.libvirt.virt-aa-helper",
        ),
    ],
)
def test_profiles_must_be_loaded_and_enforced(listing: str, verdict: Verdict, fix: str) -> None:
    outcome = confinement.judge_profiles(listing)
    assert (outcome.verdict, outcome.fix) == (verdict, fix)


V1 = "cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu,cpuacct 0 0\n"


@pytest.mark.parametrize(
    ("mounts", "kind"),
    [
        ("proc /proc proc rw 0 0\n", "none"),
        (V1, "version 1"),
        ("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n", "version 2"),
        (V1 + "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n", "hybrid"),
    ],
)
def test_the_kind_of_cgroups_is_read_from_the_mounts(mounts: str, kind: str) -> None:
    assert cgroups.parse_mounts(mounts).kind == kind


NETWORK = NetworkFacts(
    name="hvctl",
    is_active=True,
    is_autostart=True,
    bridge="hvbr0",
    subnets=(network.IPv4Network("10.20.30.0/24"),),
    has_dhcp=True,
    is_routed=True,
)


@pytest.mark.parametrize(
    ("route", "verdict"),
    [
        ({"dst": "default", "dev": "eth0"}, Verdict.OK),
        ({"dst": "10.20.30.0/24", "dev": "hvbr0"}, Verdict.OK),
        ({"type": "broadcast", "dst": "10.20.30.255", "dev": "hvbr0"}, Verdict.OK),
        ({"dst": "10.20.31.0/24", "dev": "eth0"}, Verdict.OK),
        ({"dst": "10.0.0.0/8", "dev": "tun0"}, Verdict.FAILED),
        ({"dst": "10.20.30.128/25", "dev": "eth0"}, Verdict.FAILED),
        ({"dst": "10.20.30.7", "dev": "wg0"}, Verdict.FAILED),
    ],
)
def test_a_route_elsewhere_for_the_guests_addresses_is_a_clash(route: dict[str, str], verdict: Verdict) -> None:
    outcome = network.judge_routes(NETWORK, network.parse_routes(json.dumps([route])))
    assert outcome.verdict is verdict
    assert verdict is Verdict.OK or route["dev"] in outcome.reason


def test_versions_are_compared_by_number() -> None:
    assert versions.parse("10.0.3") > versions.parse("9.11")
    assert versions.parse("6.1.0-13-cloud-amd64") == (6, 1)
    assert versions.parse("5.19-rc1") == (5, 19)


def test_the_doctor_leaves_no_thread_behind(bare: Host) -> None:
    doctor.run(bare)
    assert "own-mounts" not in {thread.name for thread in threading.enumerate()}
