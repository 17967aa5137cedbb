"""libvirt's hook, and the code behind it: a copy of `hvctl.hostside` that no virtual environment can take away.

The script stands in `hooks/qemu.d/`, beside whatever hook the user has (libvirt runs all of them). AppArmor lets
libvirtd execute what is below /etc/libvirt/hooks (`rmix`) and read every file, so the code itself may stay in
/usr/local/lib, where a hook of libvirt's would not be mistaken for one.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import hvctl.hostside
from hvctl.host import Host
from hvctl.hostsetup import network
from hvctl.hostsetup.change import Change
from hvctl.hostside import daemons, files, filters

CODE = Path("/usr/local/lib/hvctl")
HOOK = Path("/etc/libvirt/hooks/qemu.d/hvctl")
_SOURCE = Path(hvctl.hostside.__file__).parent

# -I: nothing of the environment; -S: no site-packages, which saves a third of the start.
_SCRIPT = f"""#!/usr/bin/python3 -IS
# Made by `hvctl host setup`, removed by `hvctl host teardown`. What it does: {CODE}/hvctl/hostside/hook.py
import sys
sys.path.insert(0, "{CODE}")
sys.dont_write_bytecode = True
from hvctl.hostside import hook
hook.main(sys.argv)
"""


def missing(_host: Host) -> Iterator[Change]:
    if _installed() != _wanted():
        yield Change(text=f"install the hook's code in {CODE}", apply=_install)
    if not HOOK.exists() or HOOK.read_text() != _SCRIPT:
        yield Change(text=f"install libvirt's hook {HOOK}", apply=_install_hook)


def present(host: Host) -> Iterator[Change]:
    """Nothing while another store's network still needs them."""
    if [name for name in network.list_registered() if name != host.config.network]:
        return
    if HOOK.exists():
        yield Change(text=f"remove libvirt's hook {HOOK}", apply=HOOK.unlink)
    if CODE.exists():
        yield Change(text=f"remove the hook's code in {CODE}", apply=functools.partial(files.remove, CODE))
    if filters.is_in_place():
        yield Change(text="remove the packet filter (nftables tables 'hvctl')", apply=filters.remove)


def _wanted() -> dict[str, bytes]:
    code = {f"hvctl/hostside/{path.name}": path.read_bytes() for path in sorted(_SOURCE.glob("*.py"))}
    return {**code, "hvctl/__init__.py": b""}


def _installed() -> dict[str, bytes]:
    return {str(path.relative_to(CODE)): path.read_bytes() for path in sorted(CODE.glob("hvctl/**/*.py"))}


def _install() -> None:
    aside = CODE / "hvctl.new"
    files.remove(aside)
    for name, content in _wanted().items():
        path = aside / Path(name).relative_to("hvctl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o644)
    files.remove(CODE / "hvctl")
    shutil.move(aside, CODE / "hvctl")


def _install_hook() -> None:
    HOOK.parent.mkdir(parents=True, exist_ok=True)
    files.write_file(HOOK, _SCRIPT.encode(), 0o755)
    daemons.reload_libvirtd()
