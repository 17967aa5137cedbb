"""Headers of disks, judged before any program of QEMU's sees them."""

from __future__ import annotations

import os
import random
import secrets
import struct
from pathlib import Path

import pytest

from hvctl.config import Config
from hvctl.errors import InvalidSpec
from hvctl.host import Host
from hvctl.hostside import qcow2
from hvctl.rootfs import intake
from hvctl.units import GIB, MIB, TIB

CLUSTER = 1 << 16
SIZE_BYTES = 10 * GIB
_FORMAT = ">4sIQIIQIIQQIIQQQQII"
# Field -> its place in the header and how it is written (docs/interop/qcow2.txt).
FIELDS = {
    "version": (4, ">I"), "backing_offset": (8, ">Q"), "backing_bytes": (16, ">I"), "cluster_bits": (20, ">I"),
    "size": (24, ">Q"), "encryption": (32, ">I"), "l1_entries": (36, ">I"), "l1_offset": (40, ">Q"),
    "refcount_offset": (48, ">Q"), "refcount_clusters": (56, ">I"), "snapshots": (60, ">I"), "snapshots_offset": (64, ">Q"),
    "incompatible": (72, ">Q"), "compatible": (80, ">Q"), "autoclear": (88, ">Q"), "refcount_order": (96, ">I"),
    "header_bytes": (100, ">I"), "compression": (104, ">B"),
}  # fmt: skip


def make(extensions: bytes = bytes(8), **fields: int) -> bytes:
    """A qcow2 file, version 3, of 10 GiB with nothing in it; with these fields instead."""
    head = struct.pack(
        _FORMAT, b"QFI\xfb", 3, 0, 0, 16, SIZE_BYTES, 0, 20, 3 * CLUSTER, CLUSTER, 1, 0, 0, 0, 0, 0, 4, 112
    )  # fmt: skip
    disk = bytearray((head + bytes(8) + extensions).ljust(4 * CLUSTER, b"\0"))
    for name, value in fields.items():
        place, how = FIELDS[name]
        struct.pack_into(how, disk, place, value)
    return bytes(disk)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(Config(store=tmp_path, run=tmp_path))


def check(host: Host, folder: Path, content: bytes, *, format: str = "") -> intake.DiskFacts:
    path = folder / "disk"
    path.write_bytes(content)
    return intake.check_disk(host, path, format=format)


def test_a_plain_disk_is_taken(host: Host, tmp_path: Path) -> None:
    assert check(host, tmp_path, make()) == intake.DiskFacts(format="qcow2", virtual_bytes=SIZE_BYTES)
    assert check(host, tmp_path, make(version=2), format="qcow2").virtual_bytes == SIZE_BYTES
    names = struct.pack(">II", 0x6803F857, 48) + bytes(48)
    assert check(host, tmp_path, make(names + bytes(8))).format == "qcow2"


@pytest.mark.parametrize("bit", range(64))
def test_only_features_that_are_known_to_be_harmless_are_taken(host: Host, tmp_path: Path, bit: int) -> None:
    fields = {"incompatible": 1 << bit, "compression": int(bit == 3)}
    if bit in (3, 4):
        assert check(host, tmp_path, make(l1_entries=40, **fields)).format == "qcow2"
        return
    with pytest.raises(InvalidSpec, match=r"dirty|corrupt|another file|not known \(bit") as caught:
        check(host, tmp_path, make(**fields))
    assert "\n" not in caught.value.message and caught.value.hint


# Fields -> what the refusal says.
MUTATIONS: list[tuple[dict[str, int], str]] = [
    ({"version": 0}, "version 0"),
    ({"version": 4}, "version 4"),
    ({"version": 2**32 - 1}, "version 4294967295"),
    ({"backing_offset": 512}, "backing file"),
    ({"backing_offset": 512, "backing_bytes": 11}, "backing file"),
    ({"backing_bytes": 1023}, "backing file"),
    ({"backing_offset": 2**63, "version": 2}, "backing file"),
    ({"cluster_bits": 0}, "clusters of"),
    ({"cluster_bits": 8}, "clusters of"),
    ({"cluster_bits": 22}, "clusters of"),
    ({"cluster_bits": 2**32 - 1}, "clusters of"),
    ({"size": 0}, "0 bytes"),
    ({"size": 16 * TIB + 1}, "is not possible"),
    ({"size": 2**64 - 1}, "is not possible"),
    ({"size": 15 * TIB, "l1_entries": 40_000}, "is not likely"),
    ({"encryption": 1}, "encrypted"),
    ({"encryption": 2}, "encrypted"),
    ({"encryption": 77}, "encrypted"),
    ({"l1_entries": 0}, "does not fit"),
    ({"l1_entries": 19}, "does not fit"),
    ({"l1_entries": 2**22 + 1}, "does not fit"),
    ({"l1_entries": 2**32 - 1}, "does not fit"),
    ({"l1_entries": 2**17}, "outside the file"),
    ({"l1_offset": 0}, "outside the file"),
    ({"l1_offset": 3 * CLUSTER + 8}, "outside the file"),
    ({"l1_offset": 2**40}, "outside the file"),
    ({"l1_offset": 2**64 - CLUSTER}, "outside the file"),
    ({"refcount_offset": 0}, "outside the file"),
    ({"refcount_offset": 2**63}, "outside the file"),
    ({"refcount_clusters": 0}, "reference table"),
    ({"refcount_clusters": 129}, "reference table"),
    ({"refcount_clusters": 2**32 - 1}, "reference table"),
    ({"snapshots": 257}, "snapshots"),
    ({"snapshots": 2**32 - 1}, "snapshots"),
    ({"snapshots": 1, "snapshots_offset": 2**50}, "outside the file"),
    ({"refcount_order": 7}, "reference counts"),
    ({"refcount_order": 2**32 - 1}, "reference counts"),
    ({"header_bytes": 0}, "header of"),
    ({"header_bytes": 103}, "header of"),
    ({"header_bytes": 105}, "header of"),
    ({"header_bytes": 8192}, "header of"),
    ({"header_bytes": 2**32 - 8}, "header of"),
    ({"compression": 1}, "compression"),
    ({"compression": 2, "incompatible": 8}, "compression"),
    ({"incompatible": 8}, "compression"),
    ({"incompatible": 16, "cluster_bits": 12, "l1_entries": 2**20}, "too small"),
]


@pytest.mark.parametrize(("fields", "reason"), MUTATIONS, ids=lambda value: str(value)[:50])
def test_a_header_that_makes_no_sense_is_refused(
    host: Host, tmp_path: Path, fields: dict[str, int], reason: str
) -> None:
    with pytest.raises(InvalidSpec, match=reason):
        check(host, tmp_path, make(**fields))


EXTENSIONS = {
    "data file name": (struct.pack(">II", 0x44415441, 11) + b"/etc/shadow".ljust(16, b"\0") + bytes(8), "not known"),
    "encryption header": (struct.pack(">IIQQ", 0x0537BE77, 16, CLUSTER, 512) + bytes(8), "encrypted"),
    "unknown": (struct.pack(">II", 0xDEADBEEF, 0) + bytes(8), "not known"),
    "of 4 GiB": (struct.pack(">II", 0x6803F857, 2**32 - 1), "is not possible"),
    "longer than the cluster": (struct.pack(">II", 0x6803F857, CLUSTER), "is not possible"),
    "without an end": (struct.pack(">II", 0x6803F857, 0) * 20, "more than 16"),
}


@pytest.mark.parametrize("name", EXTENSIONS)
def test_a_header_extension_is_known_or_refused(host: Host, tmp_path: Path, name: str) -> None:
    content, reason = EXTENSIONS[name]
    with pytest.raises(InvalidSpec, match=reason):
        check(host, tmp_path, make(content))


@pytest.mark.parametrize("length", [*range(4, 120, 4), 511, CLUSTER])
def test_a_header_that_is_cut_short_is_refused(host: Host, tmp_path: Path, length: int) -> None:
    with pytest.raises(InvalidSpec, match=r"cut short|outside the file|is not possible"):
        check(host, tmp_path, make()[:length])


FOREIGN = {
    "qcow \\(version 1": b"QFI\xfb\0\0\0\x01",
    "VMDK": b"KDMV",
    "VMDK ": b'# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\nRW 1 FLAT "/etc/shadow" 0\n',
    "VDI": bytes(64) + b"\x7f\x10\xda\xbe",
    "VHDX": b"vhdxfile",
    "VHD": b"conectix",
    "VHD ": bytes(3584) + b"conectix" + bytes(504),
    "QED": b"QED\0",
    "Parallels": b"WithoutFreeSpace",
    "LUKS": b"LUKS\xba\xbe\0\x01",
    "DMG": bytes(3584) + b"koly" + bytes(508),
    "gzip": b"\x1f\x8b\x08",
    "xz": b"\xfd7zXZ\0",
    "zip": b"PK\x03\x04",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_another_format_is_refused_by_its_name(host: Host, tmp_path: Path, name: str) -> None:
    content = FOREIGN[name].ljust(4096, b"\0")
    with pytest.raises(InvalidSpec, match=f"its format is {name.strip()}"):
        check(host, tmp_path, content)
    with pytest.raises(InvalidSpec):
        check(host, tmp_path, content, format="qcow2")


@pytest.mark.parametrize("format", ["vmdk", "json:{}", "qcow", "luks", "-f", "host_device"])
def test_no_other_format_can_be_asked_for(host: Host, tmp_path: Path, format: str) -> None:
    with pytest.raises(InvalidSpec, match="only qcow2 and raw"):
        check(host, tmp_path, make(), format=format)


def test_what_is_said_to_be_raw_is_raw_whatever_a_guest_wrote_into_it(host: Host, tmp_path: Path) -> None:
    content = make(backing_offset=512, backing_bytes=11) + b"odd"
    facts = check(host, tmp_path, content, format="raw")
    assert facts == intake.DiskFacts(format="raw", virtual_bytes=4 * CLUSTER + 512)
    assert check(host, tmp_path, bytes(MIB)).format == "raw"
    with pytest.raises(InvalidSpec, match="0 bytes"):
        check(host, tmp_path, b"")


def test_what_is_no_file_is_refused_at_once(host: Host, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(InvalidSpec, match="no regular file"):
            intake.check_disk(host, path)


def fuzz(folder: Path, seed: int, rounds: int) -> int:
    """Flip, set and cut at random in headers; gives how many were taken. Fails on anything but a verdict."""
    dice, taken = random.Random(seed), 0
    path = folder / "disk"
    for _round in range(rounds):
        disk = bytearray(make())
        for _change in range(dice.randint(1, 6)):
            name = dice.choice(list(FIELDS))
            place, how = FIELDS[name]
            most = 2 ** (8 * struct.calcsize(how)) - 1
            value = dice.choice([0, 1, most, most // 2, 1 << dice.randrange(most.bit_length()), dice.randint(0, most)])
            struct.pack_into(how, disk, place, value)
            if dice.random() < 0.3:
                disk[dice.randrange(160)] ^= 1 << dice.randrange(8)
        path.write_bytes(disk[: dice.choice([len(disk), dice.randint(1, 200)])])
        found, virtual_bytes, reason = qcow2.examine(path, dice.choice(["", "qcow2"]), 16 * TIB, 10**6)
        assert bool(reason) != bool(found) and reason.isprintable() and len(reason) < 200
        if found == "qcow2":
            taken += 1
            head = path.read_bytes()
            version, backing, *_rest = struct.unpack_from(">IQ", head, 4)
            features = struct.unpack_from(">Q", head, 72)[0] if version == 3 else 0
            assert backing == 0 and features & ~0b11000 == 0 and 0 < virtual_bytes <= 16 * TIB
    return taken


def test_random_headers_get_a_verdict(tmp_path: Path) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    assert fuzz(tmp_path, seed, 400) > 0


@pytest.mark.long
def test_many_random_headers_get_a_verdict(tmp_path: Path) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    assert fuzz(tmp_path, seed, 100_000) > 0
