"""The record in a domain's metadata: there and back, newer ones refused, unknown parts kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hvctl import metadata
from hvctl.errors import InvalidSpec, Unsupported
from hvctl.instances.examples import make_record
from hvctl.libvirtapi import domains
from hvctl.libvirtapi.connection import Connection
from hvctl.model import Accelerator, Cache, DataDisk, DiskKind, Mode, PendingOperation, Throttle, VolumeFormat
from tests.payloads import PAYLOADS

DOMAIN = (
    "<domain type='test'><name>example</name><uuid>00000000-0000-4000-8000-000000000001</uuid><memory>1024</memory>"
    "<metadata><other xmlns='urn:other' a='b'/></metadata><os><type>hvm</type></os></domain>"
)
RECORD = replace(
    make_record(Mode.VM, "default", Path("/store"), {"K": "V"}),
    authorized_keys=("ssh-ed25519 AAAA one", "ssh-ed25519 BBBB two"),
    labels=(("owner", "me"),),
    disks=(
        DataDisk(name="bare", kind=DiskKind.ISO, format=VolumeFormat.RAW, source="/srv/a.iso"),
        DataDisk(
            name="data",
            kind=DiskKind.VOLUME,
            format=VolumeFormat.QCOW2,
            volume="00000000-0000-4000-8000-000000000003",
            size_bytes=2**34,
            filesystem="ext4",
            is_guest_written=True,
            target="vdb",
            serial="data",
            is_read_only=True,
            cache=Cache.NONE,
            has_discard=False,
            throttle=Throttle(iops=5, bytes_per_s=6),
        ),
    ),
    pending=PendingOperation(verb="create", step="root", arguments=(("from", "a"),)),
    accelerator=Accelerator.KVM,
)


def test_the_first_id_is_found_without_parsing_in_whatever_form_libvirt_writes_it() -> None:
    """Ours with a prefix, as it is defined; libvirt's without, once the record was changed."""
    record = replace(RECORD, first_id=0x70010000)
    element = metadata.format_element(record)
    embedded = metadata.embed("<domain><name>web</name></domain>", record)
    assert "<hvctl:container" in embedded
    assert "<container" in element
    assert metadata.find_first_ids(element) == metadata.find_first_ids(embedded) == [0x70010000]
    assert metadata.find_first_ids(metadata.format_element(replace(record, first_id=0))) == []


def test_a_record_comes_back_as_it_was() -> None:
    assert metadata.find(metadata.embed(DOMAIN, RECORD)) == RECORD


def test_embedding_replaces_the_old_record_and_keeps_other_metadata() -> None:
    twice = metadata.embed(metadata.embed(DOMAIN, RECORD), replace(RECORD, pending=None))
    assert twice.count("<hvctl:instance") == 1
    assert "urn:other" in twice
    assert metadata.find(twice) == replace(RECORD, pending=None)


def test_a_record_survives_libvirt() -> None:
    """Defined with it, then written by itself: libvirt gives back what we gave it."""
    connection = Connection.open("test:///default")
    domain = domains.define(connection, metadata.embed(DOMAIN, RECORD))
    assert metadata.find(domains.get_xml(domain)) == RECORD
    changed = replace(RECORD, address="10.9.8.7", pending=None)
    domains.set_metadata(domain, metadata.format_element(changed), prefix=metadata.PREFIX, uri=metadata.URI)
    assert metadata.find(domains.get_xml(domain)) == changed
    connection.close()


def test_a_domain_of_somebody_elses_has_no_record() -> None:
    assert metadata.find(DOMAIN) is None
    assert metadata.find(DOMAIN.replace("urn:other", "urn:hvctl")) is None


def test_a_newer_schema_is_refused() -> None:
    with pytest.raises(Unsupported, match="newer hvctl"):
        metadata.find(metadata.embed(DOMAIN, RECORD).replace('schema="1"', 'schema="2"'))


def test_unknown_parts_are_kept() -> None:
    xml = metadata.embed(DOMAIN, RECORD).replace("</hvctl:instance>", "<hvctl:later x='1'/></hvctl:instance>")
    record = metadata.find(xml)
    assert record is not None
    assert "later" in metadata.embed(DOMAIN, record)


@pytest.mark.parametrize(
    ("whole", "damaged"),
    [
        ('mode="vm"', 'mode="toaster"'),
        ('cpus="2"', 'cpus="two"'),
        ("hvctl:interface", "hvctl:interfxce"),
        ('mac="', 'mxc="'),
    ],
)
def test_a_damaged_record_is_named(whole: str, damaged: str) -> None:
    xml = metadata.embed(DOMAIN, RECORD)
    assert whole in xml
    with pytest.raises(InvalidSpec, match="record of 'example' is damaged"):
        metadata.find(xml.replace(whole, damaged))


@pytest.mark.parametrize("payload", [payload for payload in PAYLOADS if payload.isprintable()])
def test_texts_in_a_record_stay_texts(payload: str) -> None:
    record = replace(RECORD, labels=((payload, payload),), authorized_keys=(payload,), host_key=payload)
    assert metadata.find(metadata.embed(DOMAIN, record)) == record
