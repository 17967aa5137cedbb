"""A guest of a built image: who it is comes from outside at every boot, and its kernel survives upgrades."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hvctl import gc, operation
from hvctl.access import keys
from hvctl.config import Config
from hvctl.events import Sink
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.instances import change, create, enter, lifecycle, query
from hvctl.instances.create import Request
from hvctl.instances.kernel import update_kernel
from hvctl.instances.verbs import KERNEL
from hvctl.libvirtapi import domains
from hvctl.model import Mode, Spec, Wait
from hvctl.rootfs import published
from hvctl.units import GIB, MIB
from tests import victims

pytestmark = pytest.mark.guest

NAME, OLD, RENAMED = "image-guest", "image-old", "image-renamed"
NEWER = "6.99.0-1-cloud-amd64"
DISK_BYTES = 12 * GIB

# A newer kernel for `hvctl kernel` to find: the same code under another release, as a package, without its modules.
_SMALL_KERNEL = r"""
set -eu
new=6.99.0-1-cloud-amd64
old=$(uname -r)
tree=/srv/small
mkdir -p $tree/DEBIAN $tree/boot $tree/usr/lib/modules/$new
cp /boot/vmlinuz-$old $tree/boot/vmlinuz-$new
cp /boot/initrd.img-$old $tree/boot/initrd.img-$new
printf 'Package: linux-image-%s\nVersion: 6.99.1-1\nArchitecture: amd64\n' $new > $tree/DEBIAN/control
printf 'Maintainer: T <t@example.org>\nDescription: test\n' >> $tree/DEBIAN/control
dpkg-deb -Znone --root-owner-group -b $tree /srv/small.deb > /dev/null
dpkg -i /srv/small.deb
rm -r $tree
"""

# One as the archive would bring it: with modules and hooks, its meta package, a repository.
_NEWER_KERNEL = r"""
set -eu
new=6.99.0-1-cloud-amd64
old=$(uname -r)
tree=/srv/repo/image
mkdir -p $tree/DEBIAN $tree/boot $tree/lib/modules /srv/repo/meta/DEBIAN
cp /boot/vmlinuz-$old $tree/boot/vmlinuz-$new
cp /boot/config-$old $tree/boot/config-$new
mkdir -p $tree/lib/modules/$new/kernel
cp /lib/modules/$old/modules.order /lib/modules/$old/modules.builtin* $tree/lib/modules/$new/
for name in virtio net/core net/net_failover.ko net/virtio_net.ko block/virtio_blk.ko char hw_random firmware; do
    find /lib/modules/$old/kernel -path "*/$name*" -name '*.ko*'
done | sort -u | while read -r module; do
    to=$tree/lib/modules/$new/${module#/lib/modules/$old/}
    mkdir -p "$(dirname "$to")"
    cp "$module" "$to"
done
control() {
    printf 'Package: %s\nDepends: %s\nVersion: 6.99.1-1\nArchitecture: amd64\n' "$1" "$2"
    printf 'Maintainer: T <t@example.org>\nDescription: test\n'
}
control linux-image-$new kmod > $tree/DEBIAN/control
cat > $tree/DEBIAN/postinst <<POSTINST
#!/bin/sh -e
depmod $new
DEB_MAINT_PARAMS="\$*" run-parts --exit-on-error --arg=$new --arg=/boot/vmlinuz-$new /etc/kernel/postinst.d
POSTINST
chmod 755 $tree/DEBIAN/postinst
control linux-image-cloud-amd64 linux-image-$new > /srv/repo/meta/DEBIAN/control
cd /srv/repo
dpkg-deb -Znone --root-owner-group -b image image.deb > /dev/null
dpkg-deb -Znone --root-owner-group -b meta meta.deb > /dev/null
for package in image meta; do
    dpkg-deb -f $package.deb
    printf 'Filename: ./%s.deb\nSize: %s\n' $package "$(stat -c %s $package.deb)"
    printf 'SHA256: %s\n\n' "$(sha256sum $package.deb | cut -d' ' -f1)"
done > Packages
rm -f /etc/apt/sources.list.d/*
echo 'deb [trusted=yes] file:/srv/repo ./' > /etc/apt/sources.list.d/test.list
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
apt-get -qq -y full-upgrade
apt-get -qq -y autoremove --purge
"""


@pytest.fixture(scope="module")
def running(host: Host, debian_image: str) -> Iterator[str]:
    """A guest of the built image, its disk larger than the image's."""
    make(host, NAME, debian_image)
    yield NAME
    lifecycle.delete(host, NAME)


def make(host: Host, name: str, image: str) -> None:
    spec = Spec(name=name, mode=Mode.VM, image=image, memory_bytes=512 * MIB, disk_bytes=DISK_BYTES)
    authorized = (keys.new_pair().public, keys.ensure_own_key())
    create.create(host, Request(spec=spec, authorized_keys=authorized, wait=Wait.AGENT))


def sh(host: Host, script: str, name: str = NAME) -> str:
    done = enter.exec_(host, name, ("sh", "-s"), script.encode())
    assert done.status == 0, done.stderr.decode()
    return done.stdout.decode().strip()


def start(host: Host, name: str) -> None:
    lifecycle.start(host, name, goal=Wait.AGENT, timeout_s=90)


def test_it_is_who_it_was_told_to_be(host: Host, running: str) -> None:
    record = query.get(host, NAME).record
    assert sh(host, "cat /etc/hostname /proc/sys/kernel/hostname").split() == [NAME, NAME]
    assert sh(host, "getent hosts $(hostname) | tr -s ' '") == f"127.0.1.1 {NAME}"
    public = sh(host, "ssh-keygen -y -f /run/hvctl/ssh_host_ed25519_key")
    assert public.split()[:2] == record.host_key.split()[:2]
    assert sh(host, "cat /run/hvctl/authorized_keys").splitlines() == list(record.authorized_keys)
    assert sh(host, "stat -c '%a %U' /run/hvctl/ssh_host_ed25519_key") == "600 root"


def test_no_key_of_its_host_is_on_its_disk(host: Host, running: str) -> None:
    assert sh(host, "ls /etc/ssh/ssh_host_* /root/.ssh/authorized_keys 2>/dev/null || :") == ""
    assert (
        sh(host, "find /etc /root /home /srv /opt /var -xdev -type f -exec grep -ls 'BEGIN OPENSSH PRIVATE' {} + || :")
        == ""
    )


def test_every_unit_of_it_runs(host: Host, running: str) -> None:
    sh(host, "systemctl is-system-running --wait || :")
    assert sh(host, "systemctl --failed --plain --no-legend") == ""
    assert sh(host, "systemctl is-system-running") == "running"


def test_it_has_the_name_server_of_its_network(host: Host, running: str) -> None:
    assert sh(host, "cat /etc/resolv.conf").startswith("nameserver ")


def test_its_root_grows_to_its_disk(host: Host, running: str) -> None:
    assert int(sh(host, "findmnt -bno SIZE / || df -B1 --output=size / | tail -1")) > 0.95 * DISK_BYTES


def test_its_machine_id_is_its_own(host: Host, running: str) -> None:
    assert len(sh(host, "cat /etc/machine-id")) == 32


def test_a_name_given_inside_stays_until_another_comes_from_outside(host: Host, running: str) -> None:
    sh(host, "echo chosen-inside > /etc/hostname; /usr/lib/hvctl/identity")
    assert sh(host, "cat /etc/hostname") == "chosen-inside"


def _update_kernel(host: Host, name: str, events: Sink) -> object:
    return update_kernel(host, name, events)


@pytest.fixture(scope="module")
def upgraded(host: Host, running: str) -> str:
    """The same, with a newer kernel installed in it."""
    sh(host, _SMALL_KERNEL)
    assert sh(host, "/usr/lib/hvctl/kernel newest") == NEWER
    return running


@pytest.mark.parametrize("step", KERNEL.step_names())
def test_a_kernel_update_that_was_killed_is_undone_or_finished(
    host: Host, settings: Config, upgraded: str, step: str
) -> None:
    before = query.get(host, NAME).record
    victims.die_at(settings, _update_kernel, KERNEL.name, step, NAME)
    collected = gc.collect(host)
    after = query.get(host, NAME).record
    assert after.pending is None
    assert (after.kernel_release == NEWER) == (KERNEL.index(step) > KERNEL.index("swap")), collected
    assert not [name for name in files.list_names(host.store.instance(before.uuid)) if name.endswith(".new")]
    assert gc.collect(host) == ()
    effects_domain = domains.get(host.connection(Mode.VM), before.uuid)
    operation.write_record(host, effects_domain, before)  # so that the next step is come to again


def test_the_guests_newest_kernel_is_booted(host: Host, upgraded: str) -> None:
    check_newest_is_booted(host, NAME)


def check_newest_is_booted(host: Host, name: str) -> None:
    """`hvctl kernel` takes the newest, pins its package, and it is what starts next."""
    assert update_kernel(host, name) == NEWER
    record = query.get(host, name).record
    assert record.kernel_release == NEWER
    assert sh(host, "apt-mark showhold", name) == f"linux-image-{NEWER}"
    theirs = sh(host, f"sha256sum /boot/vmlinuz-{NEWER} /boot/initrd.img-{NEWER} | cut -d' ' -f1", name).split()
    assert theirs == [
        files.hash_file(path) for path in (host.store.kernel(record.uuid), host.store.initrd(record.uuid))
    ]
    lifecycle.stop(host, name, force=True)
    start(host, name)
    assert sh(host, "lsmod | grep -c ^virtio_net", name) == "1"


@pytest.mark.long
def test_its_kernel_survives_an_upgrade_and_autoremove(host: Host, debian_image: str) -> None:
    """And a new name: the old kernel boots until the new one is asked for, and then that one does."""
    make(host, OLD, debian_image)
    try:
        record = query.get(host, OLD).record
        release = record.kernel_release
        assert sh(host, "uname -r", OLD) == release
        sh(host, _NEWER_KERNEL, OLD)
        assert sh(host, "/usr/lib/hvctl/kernel newest", OLD) == NEWER
        assert sh(host, f"modinfo -k {release} -F filename virtio_net overlay | wc -l", OLD) == "2"
        image = published.get_image(host, record.spec.image)
        assert image.initrd is not None
        # Made by our hook, not the 15 MB of Debian's own.
        size_bytes = int(sh(host, f"stat -c %s /boot/initrd.img-{NEWER}", OLD))
        assert 0.5 < size_bytes / image.initrd.size_bytes < 2

        lifecycle.stop(host, OLD)
        change.rename(host, OLD, RENAMED)
        start(host, RENAMED)
        assert sh(host, "cat /etc/hostname /proc/sys/kernel/hostname", RENAMED).split() == [RENAMED, RENAMED]
        assert sh(host, "uname -r; lsmod | grep -c ^virtio_net; modprobe overlay", RENAMED).split() == [release, "1"]
        check_newest_is_booted(host, RENAMED)
    finally:
        for name in (OLD, RENAMED):
            if query.find(host, name):
                lifecycle.delete(host, name)
