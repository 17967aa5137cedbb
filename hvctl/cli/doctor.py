"""`hvctl host doctor`."""

from __future__ import annotations

import dataclasses

import click

from hvctl.cli.app import App, output_options

COLUMNS = ("VERDICT", "CHECK", "REASON", "FIX")


@click.command()
@output_options
def doctor(app: App) -> None:
    """Check whether this host can run guests, and name the command that mends what is wrong. Changes nothing.

    Exits with 8 when no VM could run at all.

    Example: hvctl host doctor
    """
    from hvctl import doctor as checks
    from hvctl.errors import HostError

    findings = checks.run(app.host)
    broken = checks.list_broken(findings)
    details = {"can_run_vms": not broken, "findings": [dataclasses.asdict(finding) for finding in findings]}
    rows = [(finding.verdict.value, finding.name, finding.reason, finding.fix) for finding in findings]
    app.print_result(details, lambda: app.print_table(COLUMNS, rows))
    if broken:
        names = ", ".join(finding.name for finding in broken)
        raise HostError(f"no VM can run on this host: {names}", hint=broken[0].fix)
