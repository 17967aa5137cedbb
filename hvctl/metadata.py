"""An instance's record as an XML element in its domain's `<metadata>`, and back.

The only place that knows the element's shape. It has a schema version: a newer one is refused, elements that we do not
know are kept as they are. It holds no secret: anybody who may read libvirt may read it.

    <hvctl:instance xmlns:hvctl="urn:hvctl" schema="1" store="/var/lib/hvctl" created="2026-01-31T12:00:00Z">
      <hvctl:spec mode="vm" image="debian-12" cpus="2" memory="1073741824" disk="0" template="default" accel="auto"
          autostart="no" cpuset="0-1" processes="0" privileged="no" ephemeral="no">
        <hvctl:variable name="K" value="V"/>
        <hvctl:mount source="/srv/data" target="/data" read-only="no" uid="1000" gid="1000"/>
      </hvctl:spec>
      <hvctl:root image="ID" kernel="6.1.0-1-cloud-amd64" accelerator="tcg" snapshot="UUID"><hvctl:layer id="UUID"/></hvctl:root>
      <hvctl:container first-id="1879048192"/>
      <hvctl:interface network="hvctl" mac="52:..." address="10.1.2.3" device="hv0123456789"/>
      <hvctl:access user="root" provision="credentials" host-key="ssh-ed25519 AAAA..."><hvctl:key>...</hvctl:key></hvctl:access>
      <hvctl:label name="K" value="V"/>
      <hvctl:disk name="data" kind="volume" format="raw" volume="UUID" source="" size="10737418240" filesystem="ext4"
          guest-written="yes" target="vdb" serial="data" read-only="no" cache="default" discard="yes" iops="0" bytes="0"/>
      <hvctl:snapshot id="UUID" name="before" layer="UUID" parent="" taken="2026-01-31T12:00:00Z" comment=""
          consistency="frozen" purpose="user" mode="vm"/>
      <hvctl:keep every="hourly" count="24"/>
      <hvctl:pending verb="create" step="root"><hvctl:argument name="K" value="V"/></hvctl:pending>
    </hvctl:instance>
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from uuid import UUID
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from hvctl.errors import InvalidSpec, Unsupported
from hvctl.model import (
    AccelChoice,
    Accelerator,
    Cache,
    Consistency,
    DataDisk,
    DiskKind,
    Mode,
    Mount,
    PendingOperation,
    Provision,
    Purpose,
    Record,
    Snapshot,
    Spec,
    Throttle,
    VolumeFormat,
)

PREFIX = "hvctl"
URI = "urn:hvctl"
SCHEMA = 1

_NS = f"{{{URI}}}"
_KNOWN = {
    _NS + tag
    for tag in (
        *("spec", "root", "container", "interface", "access", "label"),
        *("disk", "snapshot", "keep", "pending"),
    )
}

ElementTree.register_namespace(PREFIX, URI)


def find(domain_xml: str) -> Record | None:
    """The record in a domain's XML, or None when hvctl did not make that domain.

    Name and UUID are the domain's own. Raises Unsupported for a newer schema, InvalidSpec for a damaged record.
    """
    if URI not in domain_xml:
        return None
    domain = ElementTree.fromstring(domain_xml)
    element = domain.find(f"./metadata/{_NS}instance")
    if element is None:
        return None
    name = domain.findtext("name", "")
    if int(element.get("schema", "0")) > SCHEMA:
        raise Unsupported(
            f"{name!r} was made by a newer hvctl (record schema {element.get('schema')}, this one knows {SCHEMA})",
            hint="upgrade hvctl on this machine",
        )
    try:
        return _parse(element, name, UUID(domain.findtext("uuid", "")))
    except (KeyError, ValueError, AttributeError) as error:
        raise InvalidSpec(
            f"the record of {name!r} is damaged: {error}", hint=f"restore it from the store: hvctl host recover {name}"
        ) from error


def find_first_ids(domain_xml: str) -> list[int]:
    """The first ids of containers that a domain's XML speaks of, without parsing it: at most one, and 0 is none."""
    return [
        int(number)
        for number in re.findall(r"""<(?:[a-z]+:)?container first-id=['"](\d+)['"]""", domain_xml)
        if number != "0"
    ]


def format_element(record: Record) -> str:
    """The record as the XML element that `virDomainSetMetadata` takes.

    libvirt adds `xmlns:hvctl` itself and fails where it is there already, so ours is the default namespace here.
    """
    top = _build(record)
    for element in top.iter():
        element.tag = element.tag.removeprefix(_NS)
    top.set("xmlns", URI)
    return ElementTree.tostring(top, encoding="unicode")


def embed(domain_xml: str, record: Record) -> str:
    """The domain's XML with this record in its `<metadata>`, in place of an older one; other metadata stays."""
    domain = ElementTree.fromstring(domain_xml)
    metadata = domain.find("metadata")
    if metadata is None:
        metadata = Element("metadata")
        names = [child.tag for child in domain]
        domain.insert(names.index("name") + 1 + ("uuid" in names), metadata)
    for old in metadata.findall(f"{_NS}instance"):
        metadata.remove(old)
    metadata.append(_build(record))
    ElementTree.indent(domain)
    return ElementTree.tostring(domain, encoding="unicode") + "\n"


def format_disk(disk: DataDisk) -> dict[str, str]:
    """A data disk as names and texts: the attributes of its element, and the arguments of an intent."""
    return {
        "name": disk.name,
        "kind": disk.kind,
        "format": disk.format,
        "volume": disk.volume,
        "source": disk.source,
        "size": str(disk.size_bytes),
        "filesystem": disk.filesystem,
        "guest-written": _yes(disk.is_guest_written),
        "target": disk.target,
        "serial": disk.serial,
        "read-only": _yes(disk.is_read_only),
        "cache": disk.cache,
        "discard": _yes(disk.has_discard),
        "iops": str(disk.throttle.iops),
        "bytes": str(disk.throttle.bytes_per_s),
    }


def parse_disk(fields: Mapping[str, str]) -> DataDisk:
    """What `format_disk` gave. Raises KeyError, ValueError."""
    return DataDisk(
        name=fields["name"],
        kind=DiskKind(fields["kind"]),
        format=VolumeFormat(fields["format"]),
        volume=fields.get("volume", ""),
        source=fields.get("source", ""),
        size_bytes=int(fields.get("size", "0")),
        filesystem=fields.get("filesystem", ""),
        is_guest_written=fields.get("guest-written") == "yes",
        target=fields.get("target", ""),
        serial=fields.get("serial", ""),
        is_read_only=fields.get("read-only") == "yes",
        cache=Cache(fields.get("cache", Cache.DEFAULT)),
        has_discard=fields.get("discard") != "no",
        throttle=Throttle(iops=int(fields.get("iops", "0")), bytes_per_s=int(fields.get("bytes", "0"))),
    )


def _build(record: Record) -> Element:
    spec = record.spec
    top = Element(f"{_NS}instance", {"schema": str(SCHEMA), "store": str(record.store), "created": record.created_at})
    asked = SubElement(
        top,
        f"{_NS}spec",
        {
            "mode": spec.mode,
            "image": spec.image,
            "cpus": str(spec.cpus),
            "memory": str(spec.memory_bytes),
            "disk": str(spec.disk_bytes),
            "template": spec.template,
            "accel": spec.accel,
            "autostart": _yes(spec.autostart),
            "cpuset": spec.cpuset,
            "processes": str(spec.processes),
            "privileged": _yes(spec.is_privileged),
            "ephemeral": _yes(spec.is_ephemeral),
        },
    )
    _add_pairs(asked, "variable", spec.variables)
    for mount in spec.mounts:
        owner = {"read-only": _yes(mount.is_read_only), "uid": str(mount.uid), "gid": str(mount.gid)}
        SubElement(asked, f"{_NS}mount", {"source": mount.source, "target": mount.target, **owner})
    root = SubElement(
        top,
        f"{_NS}root",
        {"image": record.image_id, "kernel": record.kernel_release, "accelerator": record.accelerator or ""},
    )
    if record.current:
        root.set("snapshot", record.current)
    for layer in record.layers:
        SubElement(root, f"{_NS}layer", {"id": layer})
    if record.first_id is not None:
        SubElement(top, f"{_NS}container", {"first-id": str(record.first_id)})
    interface = {"network": record.network, "mac": record.mac, "address": record.address, "device": record.device}
    SubElement(top, f"{_NS}interface", interface)
    access = SubElement(
        top,
        f"{_NS}access",
        {"user": record.login_user, "provision": record.provision, "host-key": record.host_key},
    )
    for key in record.authorized_keys:
        SubElement(access, f"{_NS}key").text = key
    _add_pairs(top, "label", record.labels)
    for disk in record.disks:
        SubElement(top, f"{_NS}disk", format_disk(disk))
    for snapshot in record.snapshots:
        SubElement(top, f"{_NS}snapshot", _format_snapshot(snapshot))
    for every, count in record.keep:
        SubElement(top, f"{_NS}keep", {"every": every, "count": str(count)})
    if record.pending is not None:
        pending = SubElement(top, f"{_NS}pending", {"verb": record.pending.verb, "step": record.pending.step})
        _add_pairs(pending, "argument", record.pending.arguments)
    for text in record.unknown:
        top.append(ElementTree.fromstring(text))
    return top


def _add_pairs(parent: Element, tag: str, pairs: tuple[tuple[str, str], ...]) -> None:
    for name, value in pairs:
        SubElement(parent, f"{_NS}{tag}", {"name": name, "value": value})


def _parse(top: Element, name: str, uuid: UUID) -> Record:
    root, interface, access = (_child(top, tag) for tag in ("root", "interface", "access"))
    accelerator = root.get("accelerator", "")
    spec = _parse_spec(_child(top, "spec"), name)
    record = Record(
        uuid=uuid,
        spec=spec,
        store=Path(top.attrib["store"]),
        created_at=top.get("created", ""),
        image_id=root.attrib["image"],
        kernel_release=root.get("kernel", ""),
        accelerator=Accelerator(accelerator) if accelerator else None,
        layers=tuple(layer.attrib["id"] for layer in root.findall(f"{_NS}layer")),
        network=interface.attrib["network"],
        mac=interface.attrib["mac"],
        address=interface.get("address", ""),
        login_user=access.attrib["user"],
        provision=Provision(access.attrib["provision"]),
        host_key=access.get("host-key", ""),
        authorized_keys=tuple(key.text or "" for key in access.findall(f"{_NS}key")),
        labels=_pairs(top, "label"),
        disks=tuple(parse_disk(disk.attrib) for disk in top.findall(f"{_NS}disk")),
        snapshots=tuple(_parse_snapshot(item, spec.mode) for item in top.findall(f"{_NS}snapshot")),
        current=root.get("snapshot", ""),
        keep=tuple((item.attrib["every"], int(item.attrib["count"])) for item in top.findall(f"{_NS}keep")),
        unknown=tuple(ElementTree.tostring(child, encoding="unicode") for child in top if child.tag not in _KNOWN),
    )
    container, pending = top.find(f"{_NS}container"), top.find(f"{_NS}pending")
    if container is not None:
        record = replace(record, first_id=int(container.attrib["first-id"]))
    if pending is None:
        return record
    operation = PendingOperation(
        verb=pending.attrib["verb"], step=pending.attrib["step"], arguments=_pairs(pending, "argument")
    )
    return replace(record, pending=operation)


def _parse_spec(element: Element, name: str) -> Spec:
    return Spec(
        name=name,
        mode=Mode(element.attrib["mode"]),
        image=element.attrib["image"],
        cpus=int(element.attrib["cpus"]),
        memory_bytes=int(element.attrib["memory"]),
        disk_bytes=int(element.attrib["disk"]),
        template=element.attrib["template"],
        variables=_pairs(element, "variable"),
        accel=AccelChoice(element.attrib["accel"]),
        autostart=element.get("autostart") == "yes",
        cpuset=element.get("cpuset", ""),
        processes=int(element.get("processes", "0")),
        is_privileged=element.get("privileged") == "yes",
        is_ephemeral=element.get("ephemeral") == "yes",
        mounts=tuple(
            Mount(
                source=mount.attrib["source"],
                target=mount.attrib["target"],
                is_read_only=mount.get("read-only") == "yes",
                uid=int(mount.attrib["uid"]),
                gid=int(mount.attrib["gid"]),
            )
            for mount in element.findall(f"{_NS}mount")
        ),
    )


def _format_snapshot(snapshot: Snapshot) -> dict[str, str]:
    return {
        "id": snapshot.id,
        "name": snapshot.name,
        "layer": snapshot.layer,
        "parent": snapshot.parent,
        "taken": snapshot.taken_at,
        "comment": snapshot.comment,
        "consistency": snapshot.consistency,
        "purpose": snapshot.purpose,
        "mode": snapshot.mode,
    }


def _parse_snapshot(element: Element, mode: Mode) -> Snapshot:
    """`mode`: that of an instance which could not change it yet."""
    return Snapshot(
        id=element.attrib["id"],
        name=element.attrib["name"],
        layer=element.attrib["layer"],
        parent=element.get("parent", ""),
        taken_at=element.get("taken", ""),
        comment=element.get("comment", ""),
        consistency=Consistency(element.attrib["consistency"]),
        purpose=Purpose(element.attrib["purpose"]),
        mode=Mode(element.get("mode", mode)),
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _child(top: Element, tag: str) -> Element:
    child = top.find(f"{_NS}{tag}")
    if child is None:
        raise KeyError(f"no <{tag}>")
    return child


def _pairs(parent: Element, tag: str) -> tuple[tuple[str, str], ...]:
    return tuple((child.attrib["name"], child.attrib["value"]) for child in parent.findall(f"{_NS}{tag}"))
