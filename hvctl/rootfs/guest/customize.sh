#!/bin/sh
# Run by mmdebstrap on the finished tree ($1): switches on and off, pins the kernel, and removes every trace of the
# machine that built it. $2 is the suite's code name.
set -eu
tree=$1 suite=$2
inside() { chroot "$tree" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 "$@"; }

release=
for image in "$tree"/boot/vmlinuz-*; do release=${image##*/vmlinuz-}; done
inside /usr/lib/hvctl/kernel pin "$release"

systemctl --root="$tree" --quiet enable \
    systemd-networkd.service ssh.service hvctl-identity.service hvctl-resolv.path \
    hvctl-resolv.service hvctl-grow.service
# Nothing that wakes up by itself in the first minutes of a guest's life, and no screen to log in at.
systemctl --root="$tree" --quiet disable getty@tty1.service 2> /dev/null || :
for unit in apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer \
    systemd-pstore.service systemd-network-generator.service remote-fs.target; do
    systemctl --root="$tree" --quiet disable "$unit" 2> /dev/null || :
done
# Fail in a container, or cost a process each at every boot and serve nobody here (a random seed would also be
# carried into every copy of the disk; virtio-rng gives a better one).
systemctl --root="$tree" --quiet mask \
    sys-kernel-config.mount sys-kernel-debug.mount sys-kernel-tracing.mount dev-hugepages.mount dev-mqueue.mount \
    sys-fs-fuse-connections.mount modprobe@configfs.service modprobe@drm.service modprobe@efi_pstore.service \
    modprobe@fuse.service modprobe@dm_mod.service modprobe@loop.service systemd-random-seed.service \
    systemd-update-utmp.service systemd-update-utmp-runlevel.service systemd-binfmt.service \
    proc-sys-fs-binfmt_misc.automount systemd-udev-load-credentials.service
# It looks for ssh by vsock at every boot and complains on the console where there is none.
mkdir -p "$tree/etc/systemd/system-generators"
ln -s /dev/null "$tree/etc/systemd/system-generators/systemd-ssh-generator"

cd "$tree"
mkdir -p etc/hvctl/identity
chmod 700 etc/hvctl/identity
printf '127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n' > etc/hosts
printf 'LANG=C.UTF-8\n' > etc/default/locale
rm -f etc/resolv.conf etc/fstab # no fstab: the initrd mounts the root; an empty one costs a remount
ln -s ../run/hvctl/resolv.conf etc/resolv.conf

rm -f etc/apt/sources.list etc/apt/sources.list.d/* etc/apt/apt.conf.d/99mmdebstrap etc/dpkg/dpkg.cfg.d/99mmdebstrap
cat > etc/apt/sources.list.d/debian.sources << SOURCES
Types: deb
URIs: http://deb.debian.org/debian
Suites: $suite $suite-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://deb.debian.org/debian-security
Suites: $suite-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
SOURCES

: > etc/machine-id
rm -f var/lib/dbus/machine-id etc/hostname etc/ssh/ssh_host_* etc/.pwd.lock root/.bash_history \
    var/lib/systemd/random-seed var/cache/ldconfig/aux-cache var/cache/debconf/*-old var/lib/dpkg/*-old
rm -rf var/log/journal var/lib/apt/lists var/cache/apt run tmp var/tmp var/lib/cloud
mkdir -p run var/lib/apt/lists/partial var/cache/apt/archives/partial
mkdir -m 1777 tmp var/tmp
find var/log -type f -delete
# Newer than /usr, so that systemd does not rebuild its caches at the first boot.
touch etc/.updated var/.updated
