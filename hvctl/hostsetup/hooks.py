"""libvirt's hook, and the code behind it: a copy of `hvctl.hostside` that no virtual environment can take away.

The script stands in `hooks/qemu.d/`, beside whatever hook the user has (libvirt runs all of them). AppArmor lets
libvirtd execute what is below /etc/libvirt/hooks (`rmix`) and read every file, so the code itself may stay in
/usr/local/lib, where a hook of libvirt's would not be mistaken for one. It lies in a directory named after its content:
a guest that starts during an upgrade runs the old code or the new one, never half of each.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

import hvctl.hostside
from hvctl.host import Host
from hvctl.hostsetup.change import Change
from hvctl.hostside import daemons, files, filters

HOOK = Path("/etc/libvirt/hooks/qemu.d/hvctl")
_CODE = filters.NETWORKS.parent
_SOURCE = Path(hvctl.hostside.__file__).parent


def missing(_host: Host) -> Iterator[Change]:
    code = code_folder()
    if not code.is_dir():
        yield Change(text=f"install the hook's code in {code}", apply=functools.partial(_install, code))
    script = format_script(code)
    if not HOOK.exists() or HOOK.read_text() != script:
        yield Change(text=f"install libvirt's hook {HOOK}", apply=functools.partial(_install_hook, script))
    if HOOK.exists() and not daemons.has_noticed(HOOK):
        reload = functools.partial(daemons.reload_libvirtd, HOOK)
        yield Change(text="let the running libvirtd notice the hook (SIGHUP)", apply=reload)


def present(host: Host) -> Iterator[Change]:
    """Nothing while another store's network still needs them."""
    if filters.list_networks(but=host.config.network):
        return
    if HOOK.exists():
        yield Change(text=f"remove libvirt's hook {HOOK}", apply=HOOK.unlink)
    if _CODE.exists():
        yield Change(text=f"remove the hook's code in {_CODE}", apply=functools.partial(files.remove, _CODE))
    if filters.is_in_place():
        yield Change(text="remove the packet filter (nftables tables 'hvctl')", apply=filters.remove)


def code_folder() -> Path:
    """Where this version's code belongs."""
    digest = hashlib.sha256()
    for path in _list_source():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return _CODE / digest.hexdigest()[:16]


def format_script(code: Path) -> str:
    """The hook itself. `-I`: nothing of the environment; `-S`: no site-packages, which saves a third of the start."""
    return f"""#!/usr/bin/python3 -IS
# Made by `hvctl host setup`, removed by `hvctl host teardown`. What it does: {code}/hvctl/hostside/hook.py
import sys
sys.path.insert(0, "{code}")
from hvctl.hostside import hook
hook.main(sys.argv)
"""


def _list_source() -> list[Path]:
    return sorted(_SOURCE.glob("*.py"))


def _install(code: Path) -> None:
    package = _CODE / f".{code.name}" / "hvctl"
    files.remove(package.parent)
    (package / "hostside").mkdir(parents=True, mode=0o755)
    (package / "__init__.py").touch(mode=0o644)
    for path in _list_source():
        copy = package / "hostside" / path.name
        copy.write_bytes(path.read_bytes())
        copy.chmod(0o644)
    files.publish(package.parent, code)


def _install_hook(script: str) -> None:
    HOOK.parent.mkdir(parents=True, exist_ok=True)
    files.write_file(HOOK, script.encode(), 0o755)
    for folder in _CODE.iterdir():
        if folder not in (filters.NETWORKS, code_folder()):
            files.remove(folder)
