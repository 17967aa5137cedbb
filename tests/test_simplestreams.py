"""`images:NAME` from a simplestreams server on loopback: two halves of one image, and indexes that are not to be trusted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from hvctl.errors import HvctlError, NotFound
from hvctl.host import Host
from hvctl.hostside import download
from hvctl.model import Firmware, Provision
from tests import stores, website
from tests.stores import holds, pull, refuse
from tests.website import Site


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return stores.make(tmp_path)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(download, "_PAUSE_S", 0.001)
    with website.serve() as site:
        yield site


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return stores.make_disk(tmp_path_factory.mktemp("disk")).read_bytes()


@dataclass
class Streams:
    """What a server has under `images:tiny/1`, before it is written down."""

    items: dict[str, dict[str, object]]
    products: dict[str, object]


@pytest.fixture
def streams(site: Site, disk: bytes, host: Host) -> Streams:
    """A simplestreams tree with two versions of an image, both halves in the newer one."""
    host.config = replace(host.config, simplestreams=site.address)
    tree = stores.make_tree({}, mode="w:xz")
    files = {
        "incus.tar.xz": (b"meta", "incus.tar.xz"),
        "rootfs.tar.xz": (tree, "root.tar.xz"),
        "disk.qcow2": (disk, "disk-kvm.img"),
    }
    items: dict[str, dict[str, object]] = {}
    for name, (body, kind) in files.items():
        path = f"images/tiny/1/amd64/default/20260102_05:24/{name}"
        site.files[f"/{path}"] = body
        items[name] = {"ftype": kind, "path": path, "size": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    product = {
        "aliases": "tiny/1,tiny/one",
        "arch": "amd64",
        "os": "Tiny",
        "release": "one",
        "variant": "default",
        "versions": {"20260101_05:24": {"items": {}}, "20260102_05:24": {"items": items}},
    }
    products = {"tiny:1:arm64": {**product, "arch": "arm64", "versions": {}}, "tiny:1:amd64": product}
    index = {
        "index": {"images": {"datatype": "image-downloads", "path": "streams/v1/images.json"}},
        "format": "index:1.0",
    }
    site.files["/streams/v1/index.json"] = json.dumps(index).encode()
    made = Streams(items, {"products": products})
    _write_products(site, made)
    return made


def _write_products(site: Site, streams: Streams) -> None:
    site.files["/streams/v1/images.json"] = json.dumps(streams.products).encode()


def test_tree_and_disk_of_one_alias_are_one_image(
    host: Host, site: Site, streams: Streams, disk: bytes, tmp_path: Path
) -> None:
    image = pull(host, "images:tiny/1")
    assert (image.os, image.version, image.has_tree, image.firmware) == ("tiny", "one", True, Firmware.UEFI)
    assert image.provision is Provision.NONE
    assert image.source == "images:tiny/1 20260102_05:24"
    assert holds(host, image, disk, tmp_path)
    assert (host.store.image(image.id) / "tree/rootfs/sbin/init").is_file()
    assert site.of("/images/tiny/1/amd64/default/20260102_05:24/incus.tar.xz") == []
    assert pull(host, "images:tiny/one", "again").id == image.id
    assert len([one for one in site.asked if one.path.endswith("disk.qcow2")]) == 1


def test_an_alias_with_a_tree_alone_is_for_containers(host: Host, site: Site, streams: Streams) -> None:
    del streams.items["disk.qcow2"]
    _write_products(site, streams)
    image = pull(host, "images:tiny/1")
    assert image.disk is None and image.has_tree and image.tree_digest.startswith("sha256:")


@pytest.mark.parametrize("name", ["rootfs.tar.xz", "disk.qcow2"])
def test_a_file_that_the_index_does_not_mean_is_refused(host: Host, site: Site, streams: Streams, name: str) -> None:
    path = f"/images/tiny/1/amd64/default/20260102_05:24/{name}"
    site.files[path] = b"x" + site.files[path][1:]
    refuse(host, "is not what it should be", "images:tiny/1")
    assert list(host.store.downloads.glob("*")) == [] or name == "disk.qcow2"


def test_a_file_longer_than_the_index_says_is_refused(host: Host, site: Site, streams: Streams) -> None:
    site.files["/images/tiny/1/amd64/default/20260102_05:24/rootfs.tar.xz"] += b"x"
    refuse(host, "larger than", "images:tiny/1")


@pytest.mark.parametrize(
    "change",
    [
        {"path": "../../etc/passwd"}, {"path": "/etc/passwd"}, {"path": "http://elsewhere/x"}, {"path": "a?b"}, {"path": "-f"},
        {"path": "a/../b"}, {"path": "a\0b"}, {"path": "x" * 300}, {"path": "a\u202eb"}, {"path": 5}, {"path": ""},
        {"sha256": ""}, {"sha256": "x"}, {"sha256": None}, {"size": 0}, {"size": -1}, {"size": "many"}, {"size": 2**60},
    ],
)  # fmt: skip
def test_an_index_that_makes_no_sense_is_refused(
    host: Host, site: Site, streams: Streams, change: dict[str, object]
) -> None:
    streams.items["rootfs.tar.xz"] |= change
    _write_products(site, streams)
    before = stores.content(host)
    with pytest.raises(HvctlError) as caught:
        pull(host, "images:tiny/1")
    assert "\0" not in caught.value.message and "\u202e" not in caught.value.message
    assert stores.content(host) == before
    assert all(one.path.startswith(("/streams", "/images", "/5")) for one in site.asked)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b'{"products": []}', b"[" * 100_000, b"\xff", b'{"products": {"x": 1}}']
)
def test_an_index_that_is_none_is_refused(host: Host, site: Site, streams: Streams, text: bytes) -> None:
    site.files["/streams/v1/images.json"] = text
    refuse(host, "(JSON|products|damaged)", "images:tiny/1")


def test_an_alias_that_is_not_there_says_which_are(host: Host, site: Site, streams: Streams) -> None:
    error = refuse(host, "has no image 'tiny/2'", "images:tiny/2", NotFound)
    assert "tiny/1" in error.hint


def test_an_index_over_plain_http_is_nothing(
    host: Host, site: Site, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", site.address)
    monkeypatch.setenv("no_proxy", "")
    site.files |= {f"http://mirror.example{path}": content for path, content in site.files.items()}
    host.config = replace(host.config, simplestreams="http://mirror.example")
    refuse(host, "can be changed on the way", "images:tiny/1")
    assert pull(host, "images:tiny/1", is_insecure=True).has_tree
