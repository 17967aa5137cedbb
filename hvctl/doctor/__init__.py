"""Is this host able to run guests, and if not, which command mends it? One function a check; nothing is changed."""

from __future__ import annotations

from collections.abc import Iterable

from hvctl.doctor import (  # the order here is the order of the table
    accelerator,
    cgroups,
    confinement,
    daemons,
    filesystem,
    network,
    storage,
    versions,
)
from hvctl.doctor.finding import CHECKS, Finding, Verdict, run_check
from hvctl.host import Host

__all__ = ["Finding", "Verdict", "can_run_vms", "run"]

_MODULES = (accelerator, daemons, confinement, storage, filesystem, cgroups, network, versions)


def run(host: Host) -> tuple[Finding, ...]:
    """What every check finds, in a fixed order. A check that fails stops no other."""
    return tuple(run_check(check, host) for check in CHECKS)


def can_run_vms(findings: Iterable[Finding]) -> bool:
    """Whether a VM can run at all: no check failed that every VM needs."""
    return not any(finding.is_vital and finding.verdict is Verdict.FAILED for finding in findings)
