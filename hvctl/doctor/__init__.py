"""Is this host able to run guests, and if not, which command mends it? One function a check; nothing is changed."""

from __future__ import annotations

from collections.abc import Iterable

from hvctl.doctor import daemons

# isort: split
# The checks are made in the order of these lines; libvirt comes first, because others need its answer.
from hvctl.doctor import accelerator, cgroups, confinement, filesystem, network, storage, versions
from hvctl.doctor.finding import CHECKS, Finding, Verdict, found, not_applicable, run_check
from hvctl.host import Host

__all__ = ["Finding", "Verdict", "can_run_vms", "list_broken", "run"]

_THEMES = (daemons, accelerator, cgroups, confinement, filesystem, network, storage, versions)


def run(host: Host) -> tuple[Finding, ...]:
    """What every check finds, in a fixed order.

    A check that fails stops no other; but where libvirt does not answer, those that must ask it are not applicable.
    """
    findings: list[Finding] = []
    for check in CHECKS:
        if check.needs_libvirt and any(item.name == daemons.LIBVIRT and item.is_failed for item in findings):
            findings.append(found(check, not_applicable("libvirt does not answer")))
        else:
            findings.append(run_check(check, host))
    return tuple(findings)


def list_broken(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The failures that keep every VM from running."""
    return tuple(finding for finding in findings if finding.is_vital and finding.is_failed)


def can_run_vms(findings: Iterable[Finding]) -> bool:
    """Whether a VM can run at all: no check failed that every VM needs."""
    return not list_broken(findings)
