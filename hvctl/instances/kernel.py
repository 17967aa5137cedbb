"""A newer kernel for a guest whose host boots it directly: the one that is installed in the guest."""

from __future__ import annotations

import io
from dataclasses import replace

from hvctl import operation
from hvctl.access import ssh
from hvctl.backends import get_backend
from hvctl.errors import GuestFailed, Unsupported
from hvctl.events import Sink, ignore
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.instances import effects, query
from hvctl.instances.claim import claim_existing
from hvctl.instances.verbs import KERNEL
from hvctl.model import Endpoint, Record
from hvctl.rootfs.treedisk import RELEASE

_GUEST_PROGRAM = "/usr/lib/hvctl/kernel"
_LIMIT_BYTES = 256 * 1024**2


def update_kernel(host: Host, name: str, events: Sink = ignore) -> str:
    """Let a running guest boot the newest kernel that is installed in it, from its next start on; gives its release.

    Its package is pinned in the guest, so that upgrades leave the modules alone. Raises Unsupported for an instance that
    boots by itself, GuestFailed when the guest has no such kernel.
    """
    host.require_root("kernel")
    with host.lock(name):
        instance = query.get_running(host, name)
        record = instance.record
        get_backend(record.mode).check_kernel()
        if not record.kernel_release:
            raise Unsupported(f"{name!r} boots its kernel itself", hint="nothing is to be done: restart it")
        endpoint = query.endpoint_of(instance)
        release = _ask(endpoint, f"{_GUEST_PROGRAM} newest")
        if not RELEASE.fullmatch(release):
            raise GuestFailed(
                f"{name!r} has no installed kernel with an initrd ({release[:60]!r})", hint="apt full-upgrade"
            )
        if release != record.kernel_release:
            with operation.begin(host, KERNEL, record, claim_existing(host), events) as change:
                with change.step("fetch"):
                    _fetch(host, record, endpoint, release)
                # The record that names the new kernel is the commit.
                with change.step("swap", replace(change.record, kernel_release=release)):
                    effects.swap_kernel(host, change.record)
                change.redo_after("swap")
        # Last, since it lets go of the old kernel's package. A crash before leaves both there; the same command pins.
        _ask(endpoint, f"{_GUEST_PROGRAM} pin {release}")
    return release


def _fetch(host: Host, record: Record, endpoint: Endpoint, release: str) -> None:
    """Both files, beside the ones in use."""
    for source, path in zip(
        (f"vmlinuz-{release}", f"initrd.img-{release}"), effects.boot_files(host, record), strict=True
    ):
        content = io.BytesIO()
        if ssh.capture(endpoint, ["cat", f"/boot/{source}"], content) != 0 or not 0 < content.tell() < _LIMIT_BYTES:
            raise GuestFailed(
                f"cannot read /boot/{source} in {record.name!r}", hint=f"hvctl ssh {record.name} -- ls /boot"
            )
        host.shell.call(files.write_file, effects.aside(path), content.getvalue(), 0o444)


def _ask(endpoint: Endpoint, command: str) -> str:
    answer = io.BytesIO()
    if ssh.capture(endpoint, [command], answer) != 0:
        raise GuestFailed(
            f"{command!r} failed in {endpoint.instance!r}",
            hint="images that hvctl builds have it; others boot by themselves",
        )
    return answer.getvalue().decode(errors="replace").strip()
