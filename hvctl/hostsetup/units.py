"""Where systemd is the init: the daemons' units, the filter's at boot, and what udev must leave alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from hvctl.host import Host
from hvctl.hostsetup import hooks
from hvctl.hostsetup.change import Change
from hvctl.hostside import daemons, files, filters

_TIMEOUT_S = 90
_UNIT = Path("/etc/systemd/system/hvctl-restore.service")

_UNIT_TEXT = """# Made by `hvctl host setup`, removed by `hvctl host teardown`.
[Unit]
Description=hvctl: packet filter of the guests' networks
Before=libvirtd.service virtqemud.service virtlxcd.service
After=network-pre.target nftables.service firewalld.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/python3 -ISc 'import sys; sys.path.insert(0, "{code}"); from hvctl.hostside import filters; filters.restore()'

[Install]
WantedBy=multi-user.target
"""

_LINK = Path("/etc/systemd/network/70-hvctl.link")
_LINK_TEXT = """# Made by `hvctl host setup`, removed by `hvctl host teardown`.
# systemd's default gives every new veth a MAC of its own (MACAddressPolicy=persistent), sometimes after libvirt has set
# the container's: it would never get its address then.
[Match]
Driver=veth
OriginalName=vnet* hv*

[Link]
NamePolicy=keep
MACAddressPolicy=none
"""


def missing(host: Host) -> Iterator[Change]:
    if not daemons.has_systemd():
        return
    for path, text in _files(host):
        if not path.exists() or path.read_text() != text:
            yield Change(text=f"write {path}", apply=functools.partial(files.write_file, path, text.encode(), 0o644))
    for unit in ("virtlogd.socket", "libvirtd.service", _UNIT.name):
        if host.shell.run(["systemctl", "is-enabled", "--quiet", unit], timeout_s=_TIMEOUT_S, check=False).status != 0:
            yield Change(text=f"enable {unit}", apply=functools.partial(_systemctl, host, "enable", unit))


def present(host: Host) -> Iterator[Change]:
    """libvirt's own units stay as they are: others use them."""
    if not daemons.has_systemd():
        return
    mine, *shared = _files(host)
    if mine[0].exists():
        yield Change(text=f"remove {mine[0]}", apply=mine[0].unlink)
    if filters.list_networks(but=host.config.network):
        return
    if _UNIT.exists():
        yield Change(text=f"disable {_UNIT.name}", apply=functools.partial(_systemctl, host, "disable", _UNIT.name))
    for path, _text in shared:
        if path.exists():
            yield Change(text=f"remove {path}", apply=path.unlink)


def _files(host: Host) -> tuple[tuple[Path, str], ...]:
    """The store's own file, then those that all stores of this host share."""
    run = host.store.run
    own = f"# Made by `hvctl host setup`.\nd {run} 0755 root root\nd {run}/locks 2770 root libvirt\n"
    return (
        (Path(f"/etc/tmpfiles.d/hvctl-{host.config.network}.conf"), own),
        (_UNIT, _UNIT_TEXT.replace("{code}", str(hooks.code_folder()))),
        (_LINK, _LINK_TEXT),
    )


def _systemctl(host: Host, verb: str, unit: str) -> None:
    host.shell.run(["systemctl", "daemon-reload"], timeout_s=_TIMEOUT_S)
    host.shell.run(["systemctl", verb, "--", unit], timeout_s=_TIMEOUT_S)
