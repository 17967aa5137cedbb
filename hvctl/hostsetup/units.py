"""Where systemd is the init: the daemons' units, the filter's at boot, and what udev must leave alone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path

from hvctl.host import Host
from hvctl.hostsetup import hooks
from hvctl.hostsetup.change import Change
from hvctl.hostside import daemons, files, filters

_TIMEOUT_S = 90
_SHARED = 2
"""How many of `_files` all stores share."""
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

_TICK_TEXTS = {
    "service": """# Made by `hvctl host setup`, removed by `hvctl host teardown`.
[Unit]
Description=hvctl: snapshots by the clock
After=libvirtd.service virtqemud.service virtlxcd.service

[Service]
Type=oneshot
Environment=HVCTL_STORE={store} HVCTL_RUN={run} HVCTL_NETWORK={network} PYTHONPATH={code}
ExecStart={python} -m hvctl snapshot tick
""",
    "timer": """# Made by `hvctl host setup`, removed by `hvctl host teardown`.
[Unit]
Description=hvctl: snapshots by the clock

[Timer]
OnCalendar=hourly
RandomizedDelaySec=5min

[Install]
WantedBy=timers.target
""",
}

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
    for unit in ("virtlogd.socket", "libvirtd.service", _UNIT.name, _tick(host, "timer").name):
        if host.shell.run(["systemctl", "is-enabled", "--quiet", unit], timeout_s=_TIMEOUT_S, check=False).status != 0:
            words = ("enable", "--now") if unit.endswith(".timer") else ("enable",)
            yield Change(text=f"enable {unit}", apply=functools.partial(_systemctl, host, words, unit))


def present(host: Host) -> Iterator[Change]:
    """libvirt's own units stay as they are: others use them."""
    if not daemons.has_systemd():
        return
    timer, shared = _tick(host, "timer"), _files(host)[-_SHARED:]
    if timer.exists():
        disable = functools.partial(_systemctl, host, ("disable", "--now"), timer.name)
        yield Change(text=f"disable {timer.name}", apply=disable)
    for path, _text in _files(host)[:-_SHARED]:
        if path.exists():
            yield Change(text=f"remove {path}", apply=path.unlink)
    if filters.list_networks(but=host.config.network):
        return
    if _UNIT.exists():
        yield Change(text=f"disable {_UNIT.name}", apply=functools.partial(_systemctl, host, ("disable",), _UNIT.name))
    for path, _text in shared:
        if path.exists():
            yield Change(text=f"remove {path}", apply=path.unlink)


def _files(host: Host) -> tuple[tuple[Path, str], ...]:
    """The store's own files, then those that all stores of this host share."""
    run = host.store.run
    own = f"# Made by `hvctl host setup`.\nd {run} 0755 root root\nd {run}/locks 2770 root libvirt\n"
    return (
        (Path(f"/etc/tmpfiles.d/hvctl-{host.config.network}.conf"), own),
        *((_tick(host, kind), _format_tick(host, text)) for kind, text in _TICK_TEXTS.items()),
        (_UNIT, _UNIT_TEXT.replace("{code}", str(hooks.code_folder()))),
        (_LINK, _LINK_TEXT),
    )


def _tick(host: Host, kind: str) -> Path:
    """The unit of a store's schedules."""
    return Path(f"/etc/systemd/system/hvctl-snapshots-{host.config.network}.{kind}")


def _format_tick(host: Host, text: str) -> str:
    settings = host.config
    return text.format(
        store=settings.store,
        run=settings.run,
        network=settings.network,
        python=sys.executable,
        code=Path(__file__).parents[2],  # a checkout that nobody installed is found, too
    )


def _systemctl(host: Host, words: tuple[str, ...], unit: str) -> None:
    host.shell.run(["systemctl", "daemon-reload"], timeout_s=_TIMEOUT_S)
    host.shell.run(["systemctl", *words, "--", unit], timeout_s=_TIMEOUT_S)
