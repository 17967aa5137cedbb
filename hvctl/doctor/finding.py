"""What a check is and what it finds; the register of all checks.

    @check("disk space", is_vital=True)
    def disk_space(host: Host) -> Outcome:
        '''The store has room for a guest.'''
        return failed("12MiB left in '/var/lib/hvctl'", fix="hvctl gc")

A check reads and tries, and never changes the host. It may raise: HvctlError and OSError become a failed finding.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import partial

from hvctl.errors import HvctlError
from hvctl.host import Host
from hvctl.values import dataclass


class Verdict(StrEnum):
    """What a check came to."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True)
class Outcome:
    """What a check returns: verdict, reason with the facts that were measured, and the command that mends it."""

    verdict: Verdict
    reason: str
    fix: str = ""


ok = partial(Outcome, Verdict.OK)
warning = partial(Outcome, Verdict.WARNING)
failed = partial(Outcome, Verdict.FAILED)
not_applicable = partial(Outcome, Verdict.NOT_APPLICABLE)

Function = Callable[[Host], Outcome]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One registered check."""

    name: str
    function: Function
    is_vital: bool
    """Whether no VM can run while it fails."""
    needs_libvirt: bool = False
    """Whether it is left out when the QEMU driver does not answer."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found on a host."""

    name: str
    verdict: Verdict
    reason: str
    fix: str
    is_vital: bool

    @property
    def is_failed(self) -> bool:
        return self.verdict is Verdict.FAILED


CHECKS: list[Check] = []


def check(name: str, *, is_vital: bool = False, needs_libvirt: bool = False) -> Callable[[Function], Function]:
    """Register a function as a check under this name; they run in the order in which they are registered."""

    def register(function: Function) -> Function:
        CHECKS.append(Check(name=name, function=function, is_vital=is_vital, needs_libvirt=needs_libvirt))
        return function

    return register


def run_check(check: Check, host: Host) -> Finding:
    """What this check finds; its failure to find anything is a finding too."""
    try:
        outcome = check.function(host)
    except HvctlError as error:
        outcome = failed(error.message, _command(error.hint))
    except OSError as error:
        outcome = failed(f"{error.filename or check.name}: {error.strerror or error}")
    return found(check, outcome)


def found(check: Check, outcome: Outcome) -> Finding:
    """The finding of a check that came to this outcome."""
    return Finding(
        name=check.name,
        verdict=outcome.verdict,
        reason=" ".join(outcome.reason.split()),
        fix=outcome.fix,
        is_vital=check.is_vital,
    )


def _command(hint: str) -> str:
    """A hint that does not lead back to the doctor."""
    return "" if "host doctor" in hint else hint
