"""libvirt's hooks, the containers' emulator wrapper, and a copy of the code behind them that no virtual environment takes away.

The hooks stand in `hooks/qemu.d/` and `hooks/lxc.d/`, beside whatever the user has (libvirt runs all). AppArmor lets
libvirtd execute what is below /etc/libvirt/hooks (`rmix`) and read every file, so the code itself may stay in
/usr/local/lib, where a hook of libvirt's would not be mistaken for one. It lies in a directory named after its content:
a guest that starts during an upgrade runs the old code or the new one, never half of each.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import hvctl.hostside
from hvctl.host import Host
from hvctl.hostsetup.change import Change
from hvctl.hostside import daemons, emulator, files, filters, groups

HOOKS = tuple(Path(f"/etc/libvirt/hooks/{driver}.d/hvctl") for driver in ("qemu", "lxc"))
_CODE = filters.NETWORKS.parent
_LONGEST_HOOK_S = 5
_SOURCE = Path(hvctl.hostside.__file__).parent


def missing(_host: Host) -> Iterator[Change]:
    code = code_folder()
    if not code.is_dir():
        yield Change(text=f"install the hook's code in {code}", apply=functools.partial(_install, code))
    scripts = {**dict.fromkeys(HOOKS, format_script(code)), Path(emulator.PROGRAM): emulator.SCRIPT}
    for path, script in scripts.items():
        if not path.exists() or path.read_text() != script:
            yield Change(text=f"install {path}", apply=functools.partial(_install_script, path, script))
    yield from _remove_old_code(code)
    unnoticed = [hook for hook in HOOKS if hook.exists() and not daemons.has_noticed(hook)]
    if unnoticed:
        reload = functools.partial(daemons.reload_libvirtd, unnoticed[-1])
        yield Change(text="let the running libvirtd notice the hooks (SIGHUP)", apply=reload)


def present(host: Host) -> Iterator[Change]:
    """Nothing while another store's network still needs them."""
    if filters.list_networks(but=host.config.network):
        return
    for hook in HOOKS:
        if hook.exists():
            yield Change(text=f"remove libvirt's hook {hook}", apply=hook.unlink)
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
    """The hooks' script. `-I`: nothing of the environment; `-S`: no site-packages, which saves a third of the start.

    Most calls of a hook concern nobody and end in the shell. Python is started by its own path, since then libvirtd's
    AppArmor profile lets it out of itself (`/usr/bin/* PUx`): inside, no overlay can be mounted. `_exit`: nobody waits
    for the interpreter to be dismantled.
    """
    return f"""#!/bin/sh
# Made by `hvctl host setup`, removed by `hvctl host teardown`. What it does: {code}/hvctl/hostside/hook.py
case $2/$3 in
prepare/begin | reconnect/begin | release/end) ;;
started/begin)
    if ! [ -d /run/systemd/system ]; then # the emulator wrapper has done all before the start, but for this
        read -r _domain kind id || exit 0
        id=${{id#*\\'}} id=${{id%%\\'*}}
        [ "$kind" = "type='lxc'" ] && [ -e "{groups.NOTES}/$1" ] || exit 0
        {{ echo {groups.UNLIKELY_VICTIM} > "/proc/$id/oom_score_adj" || echo 0 > "/proc/$id/oom_score_adj"; }} 2> /dev/null
        exit 0
    fi
    ;;
*) exit 0 ;;
esac
exec /usr/bin/python3 -ISc 'import os, sys
sys.path.insert(0, "{code}")
from hvctl.hostside import hook
hook.main(sys.argv)
os._exit(0)' "$@"
"""


def _list_source() -> list[Path]:
    """hostside, and the modules of ours that it may import."""
    return [_SOURCE.parent / "store.py", _SOURCE.parent / "values.py", *sorted(_SOURCE.glob("*.py"))]


def _install(code: Path) -> None:
    package = _CODE / f".{code.name}" / "hvctl"
    files.remove(package.parent)
    (package / "hostside").mkdir(parents=True, mode=0o755)
    (package / "__init__.py").touch(mode=0o644)
    for path in _list_source():
        copy = package / path.relative_to(_SOURCE.parent)
        copy.write_bytes(path.read_bytes())
        copy.chmod(0o644)
    files.publish(package.parent, code)


def _install_script(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_file(path, script.encode(), 0o755)


def _remove_old_code(code: Path) -> Iterator[Change]:
    """Nothing calls an older version any more once all scripts name this one."""
    for folder in sorted(_CODE.iterdir()) if code.is_dir() else []:
        if folder not in (filters.NETWORKS, code, Path(emulator.PROGRAM)):
            yield Change(text=f"remove older code, {folder}", apply=functools.partial(_remove_unused, folder))


def _remove_unused(folder: Path) -> None:
    """A hook that began before the scripts were changed imports from it to its end, which is near."""
    deadline_s = time.monotonic() + _LONGEST_HOOK_S
    while _is_a_hook_running() and time.monotonic() < deadline_s:
        time.sleep(0.02)  # not our children: there is nobody to tell us
    files.remove(folder)


def _is_a_hook_running() -> bool:
    marks = (b"hvctl.hostside import hook", *map(os.fsencode, HOOKS))
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            words = path.read_bytes()
            if any(mark in words for mark in marks):
                return True
    return False
