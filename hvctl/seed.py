"""NoCloud seed disks for cloud-init: an ISO 9660 image labelled `cidata`, made in memory.

https://cloudinit.readthedocs.io/en/22.4.2/topics/datasources/nocloud.html
The content may hold private keys: whoever writes it to a file makes that 0600.
"""

from __future__ import annotations

import io
import json

from hvctl.model import Provision, Record

_LABEL = "cidata"
# systemd-machine-id-setup(1) takes a VM's UUID.
_NEW_MACHINE: dict[str, object] = {
    "bootcmd": [
        [
            "cloud-init-per",
            "instance",
            "hvctl-machine-id",
            "sh",
            "-c",
            "rm -f /etc/machine-id /var/lib/dbus/machine-id; systemd-machine-id-setup",
        ]
    ]
}


def make_nocloud(record: Record, host_key: bytes, user_data: bytes, *, is_copy: bool = False) -> bytes:
    """The seed disk of an instance: the files of `format_files`; a copy gives up the machine id that it comes with."""
    return make_iso(format_files(record, host_key, user_data, is_copy=is_copy))


def format_files(record: Record, host_key: bytes, user_data: bytes, *, is_copy: bool = False) -> dict[str, bytes]:
    """Name and content of a seed's files: the instance's name, address by DHCP, and the user data.

    An image without hvctl's own mechanism (`Provision.NOCLOUD`) gets keys and host key this way too, as vendor data,
    so that the user data stays the user's own.
    """
    files = {
        "meta-data": _json({"instance-id": str(record.uuid), "local-hostname": record.name}),
        "user-data": user_data or b"#cloud-config\n{}\n",
        "network-config": _json(_network_config(record)),
    }
    if record.provision is Provision.NOCLOUD:
        files["vendor-data"] = b"#cloud-config\n" + _json(
            _vendor_data(record, host_key) | (_NEW_MACHINE if is_copy else {})
        )
    return files


def make_iso(files: dict[str, bytes]) -> bytes:
    """An ISO 9660 image with Rock Ridge and Joliet names, holding these files at its root."""
    from pycdlib import PyCdlib

    iso = PyCdlib()
    iso.new(interchange_level=3, vol_ident=_LABEL, joliet=3, rock_ridge="1.09")
    for index, (name, content) in enumerate(sorted(files.items())):
        iso.add_fp(io.BytesIO(content), len(content), f"/F{index}.;1", rr_name=name, joliet_path=f"/{name}")
    image = io.BytesIO()
    iso.write_fp(image)
    iso.close()
    return image.getvalue()


def _network_config(record: Record) -> dict[str, object]:
    interface = {"match": {"macaddress": record.mac}, "dhcp4": True, "dhcp-identifier": "mac"}
    return {"version": 2, "ethernets": {"primary": interface}}


def _vendor_data(record: Record, host_key: bytes) -> dict[str, object]:
    return {
        "ssh_deletekeys": True,
        "ssh_keys": {"ed25519_private": host_key.decode(), "ed25519_public": record.host_key},
        "ssh_authorized_keys": list(record.authorized_keys),
        "disable_root": False,
        "growpart": {"mode": "auto"},
    }


def _json(value: object) -> bytes:
    """JSON is YAML, so nothing needs quoting by hand."""
    return json.dumps(value).encode()
