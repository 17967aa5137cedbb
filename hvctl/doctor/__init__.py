"""Is this host able to run guests, and if not, which command mends it? One function a check; nothing is changed."""

from __future__ import annotations

from collections.abc import Iterable

from hvctl.doctor import accelerator, cgroups, confinement, daemons, filesystem, network, storage, versions
from hvctl.doctor.finding import CHECKS, Finding, Verdict, run_check
from hvctl.host import Host

__all__ = ["Finding", "Verdict", "can_run_vms", "list_broken", "run"]

# Importing one of these registers its checks; findings come in this order.
_THEMES = (accelerator, cgroups, confinement, daemons, filesystem, network, storage, versions)


def run(host: Host) -> tuple[Finding, ...]:
    """What every check finds, in a fixed order. A check that fails stops no other."""
    return tuple(run_check(check, host) for check in CHECKS)


def list_broken(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The failures that keep every VM from running."""
    return tuple(finding for finding in findings if finding.is_vital and finding.verdict is Verdict.FAILED)


def can_run_vms(findings: Iterable[Finding]) -> bool:
    """Whether a VM can run at all: no check failed that every VM needs."""
    return not list_broken(findings)
