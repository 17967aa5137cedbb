"""Types of names of what is there, which a shell completes: quick, silent where it cannot look, and nothing is checked.

What is typed is taken as it is: the verb tells what is wrong with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from hvctl.host import Host
    from hvctl.model import Record

_DEADLINE_S = 2
"""Nobody waits longer at a prompt for a libvirtd that hangs."""


class Known(click.ParamType):  # type: ignore[type-arg]  # click 8.1 has no parameters for it
    """A name out of those that `find` lists."""

    name = "name"

    def __init__(self, find: Callable[[Host, dict[str, Any]], Iterable[str]], *, or_file: bool = False) -> None:
        self._find = find
        self._or_file = or_file

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        if self._or_file and "/" in incomplete:
            return [CompletionItem(incomplete, type="file")]
        given = ctx.params.get(param.name or "")
        names = set(_look(self._find, ctx.params)) - set(given if isinstance(given, tuple) else ())
        return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]


def _look(find: Callable[[Host, dict[str, Any]], Iterable[str]], params: dict[str, Any]) -> list[str]:
    """What it lists; nothing when it fails or takes too long."""
    found: list[str] = []

    def look() -> None:
        from hvctl.host import Host

        try:
            with Host() as host:
                found.extend(find(host, params))
        except Exception:  # noqa: BLE001  a prompt is no place for an error
            return

    thread = threading.Thread(target=look, name="complete", daemon=True)
    thread.start()
    thread.join(_DEADLINE_S)
    return list(found)


def _list_instances(host: Host, _params: dict[str, Any]) -> Iterable[str]:
    return [instance.name for instance in host.instances()]


def _record_of(host: Host, params: dict[str, Any]) -> Record:
    """The instance that was named before."""
    from hvctl.instances import query

    return query.get(host, str(params.get("name") or params.get("instance"))).record


def _list_snapshots(host: Host, params: dict[str, Any]) -> Iterable[str]:
    from hvctl.instances import snapshots

    named = {params.get("old"), *(params.get("snaps") or ())}
    return [item.name for item in snapshots.list_snapshots(_record_of(host, params)) if item.name not in named]


def _list_disks(host: Host, params: dict[str, Any]) -> Iterable[str]:
    return ["root", *(disk.name for disk in _record_of(host, {"name": params.get("instance")}).disks)]


def _list_images(host: Host, _params: dict[str, Any]) -> Iterable[str]:
    from hvctl.rootfs import published

    return published.list_tags(host)


def _list_catalogue(_host: Host, _params: dict[str, Any]) -> Iterable[str]:
    from hvctl.rootfs import catalogue

    return [entry.name for entry in catalogue.load()]


def _list_templates(host: Host, params: dict[str, Any]) -> Iterable[str]:
    from hvctl import templates

    mode = "container" if params.get("container") else params.get("mode") or "vm"
    return [item.name for item in templates.list_templates(host.config.template_folders) if item.mode == mode]


INSTANCE = Known(_list_instances)
SNAPSHOT = Known(_list_snapshots)
DISK = Known(_list_disks)
IMAGE = Known(_list_images)
CATALOGUE = Known(_list_catalogue, or_file=True)
TEMPLATE = Known(_list_templates, or_file=True)
