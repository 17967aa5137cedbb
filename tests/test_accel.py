"""The accelerator is tried: what the probe says is measured here a second time, by other means."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvctl import accel
from hvctl.accel import probe, program
from hvctl.config import Config
from hvctl.errors import HostError, UsageError
from hvctl.host import Host
from hvctl.hostside import machine
from hvctl.model import AccelChoice, Accelerator
from hvctl.shell import Completed, LocalShell

REPOSITORY = Path(__file__).parent.parent
SLOWEST_HEALTHY_NS = 50.0


class RecordingShell(LocalShell):
    """Does everything for real, and remembers which programs were run and whether KVM was looked at."""

    def __init__(self) -> None:
        self.programs: list[str] = []
        self.looks = 0

    def run(self, argv: Any, **options: Any) -> Completed:
        self.programs.append(str(argv[0]))
        return super().run(argv, **options)

    def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self.looks += function is machine.find_kvm_problem
        return super().call(function, *args, **kwargs)


@pytest.fixture
def shell() -> RecordingShell:
    return RecordingShell()


@pytest.fixture
def host(tmp_path: Path, shell: RecordingShell) -> Host:
    return Host(Config(store=tmp_path, run=tmp_path), shell)


@pytest.fixture
def fake_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a shell script first in the PATH under QEMU's name; it really runs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def write(script: str) -> Path:
        path = folder / accel.QEMU_PROGRAMS[0]
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return write


def run_fake(host: Host, path: Path, *, deadline_s: float = 10) -> probe.Trial:
    return probe.run(host.shell, str(path), (), deadline_s=deadline_s)


def test_the_expected_state_is_that_of_a_walk_step_by_step() -> None:
    state = 0
    for steps in range(1000):
        assert program.state_after(steps) == state
        state = (state * 6364136223846793005 + 1) % 2**64


def test_the_firmware_has_the_size_and_reset_vector_that_a_processor_starts_at() -> None:
    image = program.build()
    assert len(image) == 65536
    assert image[0xFFF0] == 0xE9
    assert (0xFFF3 + int.from_bytes(image[0xFFF1:0xFFF3], "little")) % 65536 == 0
    assert image[0] == 0xFA


def test_a_program_that_hangs_is_killed_at_the_deadline_with_the_reason(
    host: Host, fake_qemu: Callable[[str], Path], tmp_path: Path
) -> None:
    qemu = fake_qemu(f"sleep 3600 & echo $! > {tmp_path}/child; wait")
    trial = run_fake(host, qemu, deadline_s=0.5)
    assert trial.problem == "64-bit guest code had not begun after 0.5 s"
    child = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_a_guest_that_stops_half_way_is_told_from_one_that_never_began(
    host: Host, fake_qemu: Callable[[str], Path]
) -> None:
    trial = run_fake(host, fake_qemu("printf '@\\n' >&2; sleep 0.1; printf '@\\n' >&2; exec sleep 3600"), deadline_s=1)
    assert trial.problem.startswith("64-bit guest code had done 1 of 10 rounds after 1 s, ")
    assert trial.ns_per_step is not None
    assert trial.ns_per_step > 0


def test_slow_code_with_the_right_result_is_called_emulated(host: Host, fake_qemu: Callable[[str], Path]) -> None:
    marks = "; sleep 0.06; ".join(["echo @ >&2"] * (program.ROUNDS + 1))
    trial = run_fake(host, fake_qemu(f"{marks}; echo {program.expected_line()} >&2; exit {program.EXIT_STATUS}"))
    assert trial.problem.startswith("64-bit guest code is emulated, ")


def test_a_wrong_result_is_no_kvm_however_fast(host: Host, fake_qemu: Callable[[str], Path]) -> None:
    trial = run_fake(host, fake_qemu(f"printf '@\\n@\\n@\\n@\\n=AAAA\\n' >&2; exit {program.EXIT_STATUS}"))
    assert trial.problem == "64-bit guest code came to a wrong result (=AAAA)"


def test_an_abort_names_what_qemu_said(host: Host, fake_qemu: Callable[[str], Path]) -> None:
    qemu = fake_qemu("echo qemu-x: warning: a >&2; echo qemu-x: error: failed to set MSR 0x10a >&2; kill -ABRT $$")
    assert run_fake(host, qemu).problem == "64-bit guest code aborted QEMU: failed to set MSR 0x10a"


def test_nothing_stays_among_the_temporary_files(
    host: Host, fake_qemu: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    run_fake(host, fake_qemu(f"ls {tmp_path}/tmp/*/ > {tmp_path}/seen; exec sleep 3600"), deadline_s=0.5)
    assert (tmp_path / "seen").read_text().strip() == "probe.rom"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_kept_verdict_starts_no_process(host: Host, shell: RecordingShell, fake_qemu: Callable[[str], Path]) -> None:
    fake_qemu("exit 1")
    first = accel.verdict(host)
    assert shell.looks == 1
    shell.programs.clear()
    assert accel.verdict(host) == first
    assert (shell.looks, shell.programs) == (1, [])


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"key": 1}', "\x00\xff", '{"key": "KEY", "verdict": {"a": 1}}']
)
def test_a_broken_file_is_tried_again(
    host: Host, shell: RecordingShell, fake_qemu: Callable[[str], Path], content: str
) -> None:
    key = machine.acceleration_key(str(fake_qemu("exit 1")))
    host.store.accelerator.write_text(content.replace("KEY", key))
    accel.verdict(host)
    assert shell.looks == 1
    assert json.loads(host.store.accelerator.read_text())["key"] == key


def test_another_boot_is_tried_again(host: Host, shell: RecordingShell, fake_qemu: Callable[[str], Path]) -> None:
    fake_qemu("exit 1")
    accel.verdict(host)
    kept = host.store.accelerator.read_text()
    host.store.accelerator.write_text(kept.replace(machine.read_boot_id(), "0" * 36))
    accel.verdict(host)
    assert shell.looks == 2


def test_another_qemu_is_tried_again(host: Host, shell: RecordingShell, fake_qemu: Callable[[str], Path]) -> None:
    fake_qemu("exit 1")
    accel.verdict(host)
    fake_qemu("exit 10")
    accel.verdict(host)
    assert shell.looks == 2


def test_refresh_tries_again(host: Host, shell: RecordingShell, fake_qemu: Callable[[str], Path]) -> None:
    fake_qemu("exit 1")
    accel.verdict(host)
    accel.verdict(host, refresh=True)
    assert shell.looks == 2


def test_a_verdict_is_given_where_it_cannot_be_kept(
    shell: RecordingShell, fake_qemu: Callable[[str], Path], tmp_path: Path
) -> None:
    fake_qemu("exit 1")
    host = Host(Config(store=tmp_path, run=tmp_path / "absent"), shell)
    assert accel.verdict(host).accelerator is Accelerator.TCG
    assert not host.store.run.exists()


def test_a_missing_qemu_is_a_host_error(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="qemu-system-x86_64"):
        accel.verdict(host)


def test_required_kvm_that_is_not_healthy_is_refused_with_the_reason(
    host: Host, fake_qemu: Callable[[str], Path]
) -> None:
    fake_qemu("echo qemu-x: error: broken on purpose >&2; exit 1")
    reason = accel.verdict(host).finding
    for choice, require_kvm in ((AccelChoice.KVM, False), (AccelChoice.AUTO, True)):
        with pytest.raises(HostError) as refused:
            accel.choose(host, choice, require_kvm=require_kvm)
        assert refused.value.code == 8
        assert reason in refused.value.message
    accelerator, line = accel.choose(host, AccelChoice.AUTO, require_kvm=False)
    assert accelerator is Accelerator.TCG
    assert line == f"tcg (software emulation): {reason}"


def test_software_that_was_asked_for_tries_nothing(host: Host, shell: RecordingShell) -> None:
    accelerator, line = accel.choose(host, AccelChoice.TCG, require_kvm=False)
    assert (accelerator, line, shell.looks) == (Accelerator.TCG, "tcg (software emulation): asked for", 0)
    with pytest.raises(UsageError):
        accel.choose(host, AccelChoice.TCG, require_kvm=True)


@pytest.mark.guest
def test_the_guest_program_runs_to_its_end_under_emulation(host: Host) -> None:
    trial = probe.run(host.shell, accel.get_qemu(host), probe.TCG_ARGUMENTS, deadline_s=60)
    assert trial.problem in ("", f"64-bit guest code is emulated, {trial.ns_per_step:.0f} ns a step instead of about 1")
    print(f"under TCG: {trial.ns_per_step:.2f} ns a step")


@pytest.mark.guest
def test_the_verdict_agrees_with_an_independent_timing(host: Host) -> None:
    verdict = accel.verdict(host, refresh=True)
    measured_ns = time_kvm_without_qemu()
    print(f"{verdict.line}; without QEMU: {measured_ns} ns a step")
    is_healthy = measured_ns is not None and measured_ns < SLOWEST_HEALTHY_NS
    assert (verdict.accelerator is Accelerator.KVM) == is_healthy


def time_kvm_without_qemu() -> float | None:
    """Nanoseconds of a step of 64-bit code, the best of three; none where KVM does not do it."""
    best: float | None = None
    for _attempt in range(3):
        try:
            done = subprocess.run(
                [sys.executable, REPOSITORY / "tests" / "kvm_timing.py"], capture_output=True, text=True, timeout=30
            )
        except subprocess.TimeoutExpired:
            return None
        if done.returncode != 0:
            return None
        best = min(float(done.stdout), best or float("inf"))
    return best


AS_NOBODY = """
import os, shutil  # shutil: the interpreter may lie where nobody can read any more what is imported late
from pathlib import Path
from hvctl import accel
from hvctl.config import Config
from hvctl.host import Host
os.setgroups([]); os.setgid(65534); os.setuid(65534)
verdict = accel.verdict(Host(Config(store=Path({run!r}), run=Path({run!r}))))
print(verdict.is_lasting, verdict.line)
"""

AS_ROOT = """
from pathlib import Path
from hvctl import accel
from hvctl.config import Config
from hvctl.host import Host
verdict = accel.verdict(Host(Config(store=Path({run!r}), run=Path({run!r}))))
print(verdict.is_kvm_present, verdict.line)
"""


def run_python(code: str, *, before: tuple[str, ...] = ()) -> str:
    """What a program prints that has hvctl from this tree."""
    done = subprocess.run(
        [*before, sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HOME": "/"},
    )
    return done.stdout.strip()


def with_device(device: str) -> tuple[str, ...]:
    """Runs what follows in a mount namespace of its own whose /dev has little more than this."""
    script = f'mount -t tmpfs none "$0" && cd "$0" && mknod null c 1 3 && mknod urandom c 1 9; {device}; exec "$@"'
    return "unshare", "--mount", "sh", "-c", script, "/dev"


@pytest.mark.guest
def test_a_user_without_permission_is_told_so_and_the_verdict_of_root_is_read(tmp_path: Path) -> None:
    for folder in (tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    tmp_path.chmod(0o777)  # so that it is a choice not to keep it
    before = with_device("mknod -m 600 kvm c 1 3")  # it opens, for root, and speaks no KVM
    code = AS_NOBODY.format(run=str(tmp_path))
    assert run_python(code, before=before).startswith("False tcg (software emulation): no kvm: this user (uid 65534)")
    assert not (tmp_path / "accel.json").exists(), "one user's lack of permission was kept for everybody"
    as_root = run_python(AS_ROOT.format(run=str(tmp_path)), before=before)
    assert "kvm is there but unusable" in as_root
    assert "kvm is there but unusable" in run_python(code, before=before)


@pytest.mark.guest
def test_a_host_without_the_device_says_so(tmp_path: Path) -> None:
    said = run_python(AS_ROOT.format(run=str(tmp_path)), before=with_device(":"))
    assert said.startswith("False tcg (software emulation): no kvm: /dev/kvm does not exist")
