"""The manifest of an image: a value, a file and back; and finding images by names that somebody typed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hvctl.config import Config
from hvctl.errors import HostError, InvalidSpec, NotFound, Unsupported
from hvctl.host import Host
from hvctl.model import Artefact, Disk, Image, Provision
from hvctl.rootfs import manifest, published

IMAGE = Image(
    id="",
    name="debian-12",
    os="debian",
    version="12",
    architecture="x86_64",
    created_at="2026-01-31T12:00:00Z",
    login_user="root",
    provision=Provision.CREDENTIALS,
    disk=Disk(
        artefact=Artefact(file="disk.qcow2", size_bytes=5, sha256="0" * 64), format="qcow2", virtual_bytes=10 * 1024**3
    ),
    kernel=Artefact(file="vmlinuz", size_bytes=6, sha256="1" * 64),
    initrd=Artefact(file="initrd", size_bytes=7, sha256="2" * 64),
    kernel_arguments=("root=/dev/vda", "rw"),
    kernel_release="6.1.0-1-cloud-amd64",
    has_tree=True,
    packages=("nginx",),
)
SEALED = manifest.seal(IMAGE)

NAMES_THAT_ARE_PATHS = [
    "",
    ".",
    "..",
    "../x",
    "a/../b",
    "/etc/passwd",
    "a/b",
    "-f",
    "a\0b",
    "a\n",
    "x" * 300,
    "abc\u202etxt",
    "Größe",
    "a b",
    "a..b",
    "UPPER",
]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A host with an empty store, and no libvirt."""
    store = tmp_path / "store"
    for path in (store, store / "images", store / "tags"):
        path.mkdir()
    with Host(Config(store=store, run=tmp_path / "run")) as empty:
        yield empty


@pytest.fixture
def with_image(host: Host) -> Host:
    """The same with one image, complete by name if not by content."""
    folder = host.store.image(SEALED.id)
    folder.mkdir()
    for file in ("disk.qcow2", "vmlinuz", "initrd"):
        (folder / file).write_bytes(b"x")
    (folder / "manifest.json").write_bytes(manifest.format_manifest(SEALED))
    (host.store.tags / "debian-12").write_text(f"{SEALED.id}\n")
    return host


def as_data(image: Image) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(manifest.format_manifest(image))
    return data


def test_a_manifest_comes_back_as_it_went() -> None:
    assert manifest.parse(manifest.format_manifest(SEALED), "here") == SEALED


def test_an_image_without_disk_and_kernel_comes_back_as_it_went() -> None:
    bare = manifest.seal(replace(IMAGE, disk=None, kernel=None, initrd=None))
    assert manifest.parse(manifest.format_manifest(bare), "here") == bare


def test_the_identifier_follows_the_content_and_not_name_or_time() -> None:
    assert manifest.seal(replace(IMAGE, name="other", created_at="2030-01-01T00:00:00Z")).id == SEALED.id
    assert manifest.seal(replace(IMAGE, login_user="admin")).id != SEALED.id
    assert manifest.seal(replace(IMAGE, kernel=IMAGE.initrd)).id != SEALED.id


def test_a_newer_schema_is_refused() -> None:
    content = json.dumps({**as_data(SEALED), "schema": manifest.SCHEMA + 1, "disk": "something else"}).encode()
    with pytest.raises(Unsupported, match="newer hvctl"):
        manifest.parse(content, "here")


def test_unknown_keys_are_left_aside() -> None:
    data = {**as_data(IMAGE), "later": {"a": [1, 2]}}
    data["id"] = manifest._identify(data)
    assert manifest.parse(json.dumps(data).encode(), "here") == replace(IMAGE, id=data["id"])


@pytest.mark.parametrize(
    "change",
    [
        {"kernel_arguments": ["init=/bin/sh"]},
        {"id": "f" * 64},
        {"name": None, "os": None, "disk": 5},
        {"schema": "x"},
        {"kernel": {"file": "../../etc/shadow", "size_bytes": 1, "sha256": ""}},
        {"kernel": {"file": "-rf", "size_bytes": 1, "sha256": ""}},
        {"provision": "magic"},
    ],
)
def test_a_changed_manifest_is_refused(change: dict[str, Any]) -> None:
    data = {**as_data(SEALED), **change}
    if "kernel" in change or "provision" in change:
        data["id"] = manifest._identify(data)  # sealed all the same: the value itself is refused
    with pytest.raises(InvalidSpec, match="damaged"):
        manifest.parse(json.dumps(data).encode(), "here")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"schema": 1}', b"[" * 100_000])
def test_a_file_that_is_no_manifest_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidSpec, match="damaged"):
        manifest.parse(content, "here")


def test_an_image_is_found_by_its_name(with_image: Host) -> None:
    assert published.get_image(with_image, "debian-12") == SEALED
    assert published.list_images(with_image) == (SEALED,)


def test_an_image_has_the_name_it_was_asked_by(with_image: Host) -> None:
    (with_image.store.tags / "second").write_text(SEALED.id)
    assert [image.name for image in published.list_images(with_image)] == ["debian-12", "second"]


def test_a_missing_image_names_the_command_that_makes_it(host: Host) -> None:
    assert published.find_image(host, "debian-12") is None
    with pytest.raises(NotFound) as caught:
        published.get_image(host, "debian-12")
    assert "hvctl image build debian-12" in caught.value.hint


@pytest.mark.parametrize("name", NAMES_THAT_ARE_PATHS, ids=ascii)
def test_a_name_never_becomes_a_path(with_image: Host, name: str) -> None:
    with pytest.raises(InvalidSpec, match="cannot be the name of an image"):
        published.find_image(with_image, name)


@pytest.mark.parametrize("content", ["", "../../../etc", "0" * 63, f"{SEALED.id}/x", "f" * 64])
def test_a_tag_that_names_no_image_is_an_error_of_the_host(with_image: Host, content: str) -> None:
    (with_image.store.tags / "debian-12").write_text(content)
    with pytest.raises(HostError) as caught:
        published.get_image(with_image, "debian-12")
    assert "hvctl image build debian-12" in caught.value.hint


@pytest.mark.parametrize("file", ["disk.qcow2", "vmlinuz", "initrd", "manifest.json"])
def test_an_image_that_lost_a_file_is_an_error_of_the_host(with_image: Host, file: str) -> None:
    (with_image.store.image(SEALED.id) / file).unlink()
    with pytest.raises(HostError, match=r"lost its file|vanished"):
        published.get_image(with_image, "debian-12")


def test_an_image_in_anothers_directory_is_an_error_of_the_host(with_image: Host) -> None:
    other = with_image.store.image("a" * 64)
    with_image.store.image(SEALED.id).rename(other)
    (with_image.store.tags / "debian-12").write_text("a" * 64)
    with pytest.raises(HostError, match="holds another image"):
        published.get_image(with_image, "debian-12")
