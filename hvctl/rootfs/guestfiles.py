"""The files that hvctl adds to a Debian tree (`guest/files/`), as one archive, and how to finish that tree.

The guest's side of the contract with the host, the same for both modes:

  name, host key, authorized keys   given at every boot, never stored: in a VM as fw_cfg files
      `opt/io.systemd.credentials/hvctl.{name,host_key,authorized_keys}`, which systemd makes credentials of (the
      initrd loads qemu_fw_cfg before); in a container as files of the same names in a directory that the host binds
      to `/etc/hvctl/identity`. `hvctl-identity.service` puts either into /run/hvctl, where sshd looks. Given neither,
      sshd gets a key for this one boot.
  address, name servers             DHCP by networkd; `hvctl-resolv` writes the name servers to /run/hvctl/resolv.conf
  kernel                            booted directly by the host; `/usr/lib/hvctl/kernel newest` tells which release
      to fetch, `... pin RELEASE` keeps the modules of the one that is booted through upgrades and autoremove
  initrd                            made in the guest by Debian's own update-initramfs, through a hook that keeps
      only busybox and the modules of a VM; so one from the guest boots like the one from the image
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

_GUEST = Path(__file__).parent / "guest"


def pack() -> bytes:
    """All files as a tar archive, owned by root; 0755 for scripts, 0644 for others, whatever they are here."""
    buffer = io.BytesIO()
    files = _GUEST / "files"
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(files.rglob("*")):
            content = b"" if path.is_dir() else path.read_bytes()
            entry = tarfile.TarInfo(path.relative_to(files).as_posix())
            entry.type = tarfile.DIRTYPE if path.is_dir() else tarfile.REGTYPE
            entry.mode = 0o755 if path.is_dir() or content.startswith(b"#!") else 0o644
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def read_customize_script() -> bytes:
    """The script that finishes a tree: `sh SCRIPT TREE CODE-NAME`."""
    return (_GUEST / "customize.sh").read_bytes()
