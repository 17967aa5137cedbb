"""`images:debian/12`: the format in which the Linux Containers project serves root trees and VM disks under one alias.

    SERVER/streams/v1/index.json    names the files of products
    SERVER/streams/v1/images.json   products: aliases, architecture, versions; of each its items: path, size, SHA-256

Tree and disk of one version become the two halves of one image; its disk wants UEFI. Nothing is signed: the index is as
good as the https connection that it comes by, and each file must have the digest that the index says.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from typing import Any

from hvctl.errors import InvalidSpec, NotFound
from hvctl.events import Note
from hvctl.model import Firmware, Image, Provision
from hvctl.rootfs import checksums, content, fetch, published
from hvctl.rootfs.building import Building
from hvctl.rootfs.checksums import Digest
from hvctl.rootfs.content import Described
from hvctl.rootfs.sources import Wanted
from hvctl.units import MIB
from hvctl.values import dataclass

_INDEX_BYTES = 4 * MIB
_PRODUCTS_BYTES = 64 * MIB
_ARCHITECTURE = "amd64"
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,40}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,40}){0,4}", re.ASCII)
_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:+~-]{0,80}(?:/[A-Za-z0-9_][A-Za-z0-9_.:+~-]{0,80}){0,12}", re.ASCII)
_WORD = re.compile(r"[A-Za-z0-9._-]{1,40}", re.ASCII)
# The best one first.
_TREES = ("root.tar.xz", "root.tar.gz", "squashfs")
_DISKS = ("disk-kvm.img", "disk1.img")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One file of a product."""

    kind: str
    """Its `ftype`: `root.tar.xz`, `squashfs`, `disk-kvm.img`."""
    address: str
    size_bytes: int
    digest: Digest


@dataclass(frozen=True, kw_only=True)
class Product:
    """What an alias means: the newest version of one image for this architecture."""

    os: str
    release: str
    variant: str
    version: str
    items: tuple[Item, ...]

    def find(self, kinds: tuple[str, ...]) -> Item | None:
        """The first item of one of these kinds, in their order."""
        return next((item for kind in kinds for item in self.items if item.kind == kind), None)


def acquire(work: Building, wanted: Wanted) -> Image:
    """Bring the newest version of an alias. Raises NotFound, InvalidSpec for an index or a file that is refused."""
    alias = wanted.source.removeprefix("images:")
    if not _ALIAS.fullmatch(alias):
        raise InvalidSpec(f"{wanted.source[:100]!r} is no name of an image", hint="for example images:debian/12/cloud")
    server = work.host.config.simplestreams.rstrip("/")
    _check_server(work, wanted, server)
    product = find_product(_read_products(work, server), server, alias)
    tree, disk = product.find(_TREES), product.find(_DISKS)
    items = [item for item in (tree, disk) if item is not None]
    if not items:
        raise InvalidSpec(
            f"{wanted.source!r} has neither a root tree nor a disk for VMs", hint="try another variant: /cloud"
        )
    described = Described(
        source=f"{wanted.source} {product.version}",
        origin=f"sha256:{hashlib.sha256(' '.join(item.digest.hex for item in items).encode()).hexdigest()}",
        os=product.os,
        version=product.release,
        login_user=wanted.login_user,
        firmware=Firmware.UEFI if disk else Firmware.BIOS,
    )
    for item in items:
        fetch.take_turn(work, item.address)
    known = published.find_by_origin(work.host, described.as_image(wanted.name))
    if known is not None:
        work.events(Note(work.name, "it is here already, and the newest"))
        return known
    return _make(work, product, described)


def find_product(data: dict[str, Any], server: str, alias: str) -> Product:
    """What an alias means in a file of products. Raises NotFound, InvalidSpec for a file that makes no sense."""
    try:
        for product in data["products"].values():
            aliases = [name.strip() for name in str(product["aliases"]).split(",")]
            if product["arch"] == _ARCHITECTURE and alias in aliases:
                return _parse_product(product, server)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidSpec(f"the index of {server!r} is damaged: {error!r}", hint="tell whoever runs it") from error
    known = sorted(
        {
            name
            for product in data["products"].values()
            if product.get("arch") == _ARCHITECTURE
            for name in str(product.get("aliases", "")).split(",")
            if name.split("/")[0] == alias.split("/")[0] and _ALIAS.fullmatch(name)
        }
    )
    hint = f"it has {', '.join(known[:8])}" if known else f"see what there is: {server}"
    raise NotFound(f"{server!r} has no image {alias!r} for {_ARCHITECTURE}", hint=hint)


def _make(work: Building, product: Product, described: Described) -> Image:
    """One image of both files, or of the one that there is."""
    image, tree, disk = None, product.find(_TREES), product.find(_DISKS)
    if tree is not None:
        path = _bring(work, tree, "downloading the tree").path
        image = content.add_tree(work, path, described, str(tree.digest))
    if disk is not None:
        path = _bring(work, disk, "downloading the disk").path
        with_disk = content.add_disk(work, path, replace(described, format="qcow2"))
        image = replace(image, disk=with_disk.disk) if image is not None else with_disk
        if tree is None and product.variant != "cloud":
            image = replace(image, provision=Provision.NONE)
    assert image is not None
    if image.provision is Provision.NONE and disk is not None:
        work.events(
            Note(work.name, "it has no cloud-init, so nothing can log in to a VM of it: see its variant /cloud")
        )
    return image


def _bring(work: Building, item: Item, task: str) -> fetch.Fetched:
    fetched = fetch.bring(work, item.address, limit_bytes=item.size_bytes, task=task)
    checksums.check(work, fetched, item.digest, item.address)
    return fetched


def _check_server(work: Building, wanted: Wanted, server: str) -> None:
    if fetch.is_safe(server):
        return
    if not wanted.is_insecure:
        raise InvalidSpec(
            f"what {server!r} says can be changed on the way: it is no https", hint="use https, or say --insecure"
        )
    work.events(Note(work.name, f"not verified: the index of {server} comes over plain http (--insecure)"))


def _read_products(work: Building, server: str) -> dict[str, Any]:
    index = _read_json(work, f"{server}/streams/v1/index.json", _INDEX_BYTES)
    try:
        paths = [str(entry["path"]) for entry in index["index"].values() if entry.get("datatype") == "image-downloads"]
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidSpec(f"the index of {server!r} is damaged: {error!r}", hint="tell whoever runs it") from error
    products: dict[str, Any] = {}
    for path in paths[:4]:
        data = _read_json(work, f"{server}/{_check_path(path)}", _PRODUCTS_BYTES)
        if not isinstance(data.get("products"), dict):
            raise InvalidSpec(f"{path!r} of {server!r} has no products", hint="tell whoever runs it")
        products |= data["products"]
    return {"products": products}


def _read_json(work: Building, address: str, limit_bytes: int) -> dict[str, Any]:
    text = fetch.read(work, address, limit_bytes=limit_bytes)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidSpec(f"{address!r} is no JSON: {error}", hint="is it the address of such a server?") from error
    if not isinstance(data, dict):
        raise InvalidSpec(f"{address!r} is no JSON object", hint="is it the address of such a server?")
    return data


def _parse_product(product: dict[str, Any], server: str) -> Product:
    version = max(product["versions"])
    items = []
    for item in product["versions"][version]["items"].values():
        if item["ftype"] in (*_TREES, *_DISKS):
            size_bytes = int(item["size"])
            if not 0 < size_bytes <= fetch.LIMIT_BYTES:
                raise ValueError(f"a size of {size_bytes}")
            items.append(
                Item(
                    kind=str(item["ftype"]),
                    address=f"{server}/{_check_path(str(item['path']))}",
                    size_bytes=size_bytes,
                    digest=checksums.parse_digest(str(item["sha256"])),
                )
            )
    words = [str(product.get(key) or "") for key in ("os", "release", "variant")]
    os, release, variant = (word if _WORD.fullmatch(word) else "" for word in words)
    return Product(
        os=os.lower(), release=release, variant=variant, version=ascii(version)[1:-1][:40], items=tuple(items)
    )


def _check_path(path: str) -> str:
    """A path below the server's address, and nothing else. Raises InvalidSpec."""
    if not _PATH.fullmatch(path):
        raise InvalidSpec(
            f"the index names a file {path[:80]!r}, which is no path", hint="tell whoever runs the server"
        )
    return path
