"""What comes in as an exported image is believed in nothing: names, digests, the disk, what it says of itself."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvctl.errors import HvctlError
from hvctl.host import Host
from hvctl.rootfs import bundles, published, sources
from hvctl.rootfs.sources import Wanted
from tests.test_halves import prepare

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="images are root's")

Change = Callable[[dict[str, Any], dict[str, bytes]], None]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(prepare(tmp_path))


def disk_of(tmp_path: Path, *words: str) -> bytes:
    path = tmp_path / "some.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *words, str(path), "1M"], check=True, timeout=30)
    return path.read_bytes()


def digest(content: bytes) -> dict[str, Any]:
    return {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write(tmp_path: Path, change: Change, *, links: dict[str, str] | None = None) -> Path:
    """A file as `export` writes it, but for a change."""
    members = {"vmlinuz": b"kernel", "initrd": b"initrd", "disk.qcow2": disk_of(tmp_path)}
    image: dict[str, Any] = {
        "schema": 1, "id": "", "name": "", "os": "debian", "version": "12", "architecture": "x86_64",
        "created_at": "2026-01-01T00:00:00Z", "login_user": "root", "provision": "credentials", "has_tree": False,
        "kernel_arguments": ["root=/dev/vda", "rw"], "kernel_release": "6.1.0", "packages": [],
        "disk": {"artefact": {"file": "disk.qcow2", **digest(members["disk.qcow2"])}, "format": "qcow2",
                 "virtual_bytes": 1024**2},
        "kernel": {"file": "vmlinuz", **digest(members["vmlinuz"])},
        "initrd": {"file": "initrd", **digest(members["initrd"])},
    }  # fmt: skip
    data = {"format": "hvctl-image", "schema": 1, "image": image}
    change(data, members)
    members = {name.replace("CANARY", str(tmp_path / "canary")[1:]): content for name, content in members.items()}
    data.setdefault("files", {name: digest(content) for name, content in members.items()})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in {"manifest.json": json.dumps(data).encode(), **members}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            if name in (links or {}):
                entry.type, entry.linkname, entry.size = tarfile.SYMTYPE, (links or {})[name], 0
            archive.addfile(entry, io.BytesIO(content) if entry.size else None)
    target = tmp_path / "bundle"
    packed = subprocess.run(["zstd", "-q", "-c"], input=buffer.getvalue(), capture_output=True, check=True, timeout=30)
    target.write_bytes(bundles._MARK + packed.stdout)
    return target


def nothing(_data: dict[str, Any], _members: dict[str, bytes]) -> None:
    pass


def says(key: str, value: object) -> Change:
    def change(data: dict[str, Any], _members: dict[str, bytes]) -> None:
        data["image"][key] = value

    return change


def grows(data: dict[str, Any], members: dict[str, bytes]) -> None:
    members["extra"] = b"x"


def lacks(data: dict[str, Any], members: dict[str, bytes]) -> None:
    del members["initrd"]


def lies(data: dict[str, Any], members: dict[str, bytes]) -> None:
    data["files"] = {name: digest(content) for name, content in members.items()}
    members["vmlinuz"] = b"KERNEL"


def climbs(data: dict[str, Any], members: dict[str, bytes]) -> None:
    members["../" * 40 + "CANARY"] = b"x"


def leads_out(data: dict[str, Any], members: dict[str, bytes]) -> None:
    data["image"]["kernel"]["file"] = "../../etc/passwd"


def leans(data: dict[str, Any], members: dict[str, bytes]) -> None:
    header = bytearray(members["disk.qcow2"])
    name = b"/etc/passwd"
    header[8:20] = (512).to_bytes(8, "big") + len(name).to_bytes(4, "big")  # backing file: offset, length
    header[512 : 512 + len(name)] = name
    members["disk.qcow2"] = bytes(header)


REFUSED: dict[str, tuple[Change, dict[str, str]]] = {
    "a program for the kernel to run": (says("kernel_arguments", ["init=/bin/sh"]), {}),
    "a line in an argument": (says("kernel_arguments", ["a\nb"]), {}),
    "a user that is an option": (says("login_user", "-oProxyCommand=x"), {}),
    "markup in a word": (says("os", "<x/>"), {}),
    "another machine": (says("architecture", "aarch64"), {}),
    "an unknown way to be provided": (says("provision", "magic"), {}),
    "a kernel without a disk": (says("disk", None), {}),
    "neither half": (lambda data, members: data["image"].update(disk=None, kernel=None, initrd=None), {}),
    "a newer schema": (says("schema", 2), {}),
    "an image that is none": (lambda data, members: data.update(image=[]), {}),
    "another format": (lambda data, members: data.update(format="x"), {}),
    "a file too many": (grows, {}),
    "a file too few": (lacks, {}),
    "another content": (lies, {}),
    "a path that leads out": (climbs, {}),
    "a name that leads out": (leads_out, {}),
    "a link in the place of a file": (nothing, {"vmlinuz": "/etc/passwd"}),
    "a disk on another file": (leans, {}),
    "a size that is none": (
        lambda data, members: data.update(files={"vmlinuz": {"size_bytes": "x", "sha256": ""}}),
        {},
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_and_nothing_stays(host: Host, tmp_path: Path, what: str) -> None:
    change, links = REFUSED[what]
    path = write(tmp_path, change, links=links)
    before = sorted(host.store.root.rglob("*"))
    with pytest.raises(HvctlError) as caught:
        sources.bring(host, Wanted(name="brought", source=str(path)))
    assert "\n" not in caught.value.message
    assert sorted(host.store.root.rglob("*")) == before
    assert not (tmp_path / "canary").exists()


def test_what_is_right_comes_in(host: Host, tmp_path: Path) -> None:
    """So that the others are refused for what they are."""
    sources.bring(host, Wanted(name="brought", source=str(write(tmp_path, nothing))))
    image = published.get_image(host, "brought")
    assert image.kernel is not None and image.disk is not None
    folder = host.store.image(image.id)
    assert (folder / "vmlinuz").read_bytes() == b"kernel"
    for name in ("vmlinuz", "initrd", "disk.qcow2", "manifest.json"):
        facts = (folder / name).stat()
        assert (facts.st_mode & 0o7777, facts.st_uid) == (0o444, 0)


def test_it_cannot_pass_for_another_image(host: Host, tmp_path: Path) -> None:
    """What it says of where it came from, and of its tree, is not what images are known by."""
    tree = io.BytesIO()
    with tarfile.open(fileobj=tree, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("etc"))

    def pretend(data: dict[str, Any], members: dict[str, bytes]) -> None:
        members["tree.tar"] = tree.getvalue()
        data["image"].update(has_tree=True, origin="sha256:" + "1" * 64, source="docker://debian:12")
        data["image"]["tree_digest"] = "sha256:" + "2" * 64

    image = sources.bring(host, Wanted(name="brought", source=str(write(tmp_path, pretend))))
    assert (image.origin, image.tree_digest) == ("", f"sha256:{hashlib.sha256(tree.getvalue()).hexdigest()}")
    assert image.source == str(tmp_path / "bundle")
