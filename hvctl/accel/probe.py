"""One trial of KVM: the guest program under the machine, accelerator and CPU model that a guest would get."""

from __future__ import annotations

import re
import signal
import time
from dataclasses import field

from hvctl.accel import program
from hvctl.errors import HostError, TimedOut
from hvctl.hostside import files, machine
from hvctl.model import Accelerator, AccelVerdict
from hvctl.shell import Completed, Shell
from hvctl.shell.base import Argument
from hvctl.values import dataclass

# Leaves 0.2 s of two seconds for the rest. A host that is itself emulated needs longer just to start QEMU.
DEADLINE_S = 1.8
EMULATED_HOST_DEADLINE_S = 30.0

# What libvirt makes of `<domain type='kvm'>` with host-passthrough, migratable as by default.
KVM_ARGUMENTS = ("-accel", "kvm", "-cpu", "host,migratable=on")
TCG_ARGUMENTS = ("-accel", "tcg", "-cpu", "max,la57=off")

# A step (multiply, increment, count) takes about 1 ns on hardware, the same under a KVM that is nested in hardware or
# in emulated SVM, and under TCG; 1300 ns were measured on a `/dev/kvm` that emulates. Nothing is known in between.
MOST_NS_PER_STEP = 50.0

_REASON_LIMIT = 200


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How the guest program went: `problem` is empty when it ran to its end with the right result."""

    problem: str = ""
    ns_per_step: float | None = None
    """None when not one round ended."""


@dataclass
class _Marks:
    """When the guest program spoke, and what else was written."""

    at_ns: list[int] = field(default_factory=list)
    state: str = ""
    others: list[str] = field(default_factory=list)

    def hear(self, line: str) -> None:
        now_ns = time.monotonic_ns()
        if line == "@":
            self.at_ns.append(now_ns)
        elif line.startswith("="):
            self.state = line
        else:
            self.others.append(line)

    @property
    def ns_per_step(self) -> float | None:
        """The mean over all rounds that ended; of a single one the ends may be heard late by more than it lasts."""
        rounds = len(self.at_ns) - 1
        return (self.at_ns[-1] - self.at_ns[0]) / (rounds * program.STEPS) if rounds > 0 else None


def try_kvm(shell: Shell, qemu: str) -> AccelVerdict:
    """Try KVM on the machine of this shell, as the user that it runs as."""
    absence, is_lasting = shell.call(machine.find_kvm_problem)
    if absence:
        return AccelVerdict(
            accelerator=Accelerator.TCG, is_kvm_present=False, finding=f"no kvm: {absence}", is_lasting=is_lasting
        )
    deadline_s = EMULATED_HOST_DEADLINE_S if shell.call(machine.is_emulated) else DEADLINE_S
    trial = run(shell, qemu, KVM_ARGUMENTS, deadline_s=deadline_s)
    if trial.problem:
        finding = f"kvm is there but unusable: {trial.problem}"
        return AccelVerdict(
            accelerator=Accelerator.TCG, is_kvm_present=True, finding=finding, ns_per_step=trial.ns_per_step
        )
    return AccelVerdict(
        accelerator=Accelerator.KVM,
        is_kvm_present=True,
        finding=f"64-bit guest code ran at {trial.ns_per_step:.1f} ns a step",
        ns_per_step=trial.ns_per_step,
    )


def run(shell: Shell, qemu: str, arguments: tuple[str, ...], *, deadline_s: float) -> Trial:
    """Run the guest program once under this accelerator and CPU model. Leaves nothing behind."""
    marks = _Marks()
    scratch = shell.call(files.make_scratch)
    try:
        firmware = scratch / "probe.rom"
        shell.call(files.write_file, firmware, program.build(), 0o600)
        argv: list[Argument] = [
            qemu, "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35", "-m", "16M",
            "-bios", firmware, *arguments, "-chardev", "file,id=said,path=/dev/stderr,append=on",
            "-device", "isa-debugcon,iobase=0xe9,chardev=said", "-device", "isa-debug-exit,iobase=0x501",
        ]  # fmt: skip
        ended = shell.run(argv, timeout_s=deadline_s, check=False, on_line=marks.hear)
    except TimedOut:
        return _late(marks, deadline_s)
    except HostError as error:
        return Trial(problem=error.message)
    finally:
        shell.call(files.remove, scratch)
    return _judge(marks, ended)


def _late(marks: _Marks, deadline_s: float) -> Trial:
    rounds = len(marks.at_ns)
    how_far = f"had done {rounds - 1} of {program.ROUNDS} rounds" if rounds else "had not begun"
    return Trial(
        problem=f"64-bit guest code {how_far} after {deadline_s:g} s{_speed(marks)}", ns_per_step=marks.ns_per_step
    )


def _judge(marks: _Marks, ended: Completed) -> Trial:
    ns_per_step = marks.ns_per_step
    if ended.status != program.EXIT_STATUS:
        return Trial(
            problem=f"64-bit guest code {_end(ended.status)} QEMU{_last_words(marks)}", ns_per_step=ns_per_step
        )
    if ns_per_step is None or marks.state != program.expected_line():
        return Trial(problem=f"64-bit guest code came to a wrong result ({marks.state or 'none'})")
    if ns_per_step > MOST_NS_PER_STEP:
        return Trial(problem=f"64-bit guest code is emulated{_speed(marks)}", ns_per_step=ns_per_step)
    return Trial(ns_per_step=ns_per_step)


def _speed(marks: _Marks) -> str:
    return f", {marks.ns_per_step:.0f} ns a step instead of about 1" if marks.ns_per_step else ""


def _end(status: int) -> str:
    if status == -signal.SIGABRT:
        return "aborted"
    return f"ended (status {status})"


def _last_words(marks: _Marks) -> str:
    """The first line of QEMU's that is no warning: what follows an error only repeats it."""
    for line in marks.others:
        text = re.sub(r"^qemu[^ :]*: (error: )?", "", line).strip()
        if text and not text.startswith("warning:"):
            return f": {text[:_REASON_LIMIT]}"
    return ""
