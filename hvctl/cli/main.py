"""The `hvctl` command: its groups, and the one place where a failure is printed and becomes an exit code."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    raise SystemExit(0)
