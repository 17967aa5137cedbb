"""Disks from outside, by real qemu-img in the sandbox: made clean, or refused; nothing else is opened."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hvctl.config import Config
from hvctl.errors import HostError, InvalidSpec
from hvctl.events import Event, Progress
from hvctl.host import Host
from hvctl.rootfs import intake
from hvctl.rootfs.intake import DiskFacts, Limits
from hvctl.units import GIB, MIB
from tests.test_qcow2 import CLUSTER, make

pytestmark = [pytest.mark.guest, pytest.mark.apart]  # needs root, qemu-img and bubblewrap
LIMITS = Limits(reserve_bytes=0)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(Config(store=tmp_path, run=tmp_path))


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, timeout=60)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A raw disk of 8 MiB, something at its beginning and its end."""
    path = tmp_path / "raw"
    path.write_bytes(b"begin" * 50_000 + bytes(7 * MIB))
    with path.open("r+b") as file:
        file.truncate(8 * MIB)
        file.seek(8 * MIB - 512)
        file.write(b"e" * 512)
    return path


OPTIONS = {
    "plain": (), "version 2": ("-o", "compat=0.10"), "compressed": ("-c",), "zstd": ("-c", "-o", "compression_type=zstd"),
    "extended tables": ("-o", "extended_l2=on"), "small clusters": ("-o", "cluster_size=512"),
    "large clusters": ("-o", "cluster_size=2M"), "lazy": ("-o", "lazy_refcounts=on"), "1 bit": ("-o", "refcount_bits=1"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_disk_becomes_a_clean_one(host: Host, tmp_path: Path, raw: Path, kind: str) -> None:
    source, target, back = tmp_path / "source", tmp_path / "target.qcow2", tmp_path / "back"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *OPTIONS[kind], raw, source)
    seen: list[Event] = []
    facts = intake.convert_disk(host, source, target, format="qcow2", limits=LIMITS, events=seen.append, subject="it")
    assert facts == DiskFacts(format="qcow2", virtual_bytes=8 * MIB)
    qemu_img("convert", "-f", "qcow2", "-O", "raw", target, back)
    assert back.read_bytes() == raw.read_bytes()
    assert target.stat().st_mode & 0o7777 == 0o444 and target.stat().st_uid == 0
    assert isinstance(seen[-1], Progress) and seen[-1].done == seen[-1].total
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "raw", "source", "target.qcow2"]


def test_a_raw_disk_stays_raw_whatever_a_guest_wrote(host: Host, tmp_path: Path) -> None:
    """CVE-2026-24708: it looks like a qcow2 file with a backing file."""
    canary = tmp_path / "canary"
    canary.write_bytes(b"secret" * 10_000)
    source, back = tmp_path / "source", tmp_path / "back"
    qemu_img("create", "-f", "qcow2", "-F", "raw", "-b", canary, source)
    content = source.read_bytes()
    intake.convert_disk(host, source, tmp_path / "target", format="raw", limits=LIMITS)
    qemu_img("convert", "-f", "qcow2", "-O", "raw", tmp_path / "target", back)
    assert back.read_bytes()[: len(content)] == content and b"secret" not in back.read_bytes()


def test_somebodys_private_disk_can_be_read(host: Host, tmp_path: Path, raw: Path) -> None:
    """The program has no capability to, unless the file is not root's."""
    raw.chmod(0o600)
    subprocess.run(["chown", "65534:65534", str(raw)], check=True, timeout=30)
    assert intake.convert_disk(host, raw, tmp_path / "target", format="raw", limits=LIMITS).virtual_bytes == 8 * MIB


CANARY_FILES = {
    "backing file": ("-F", "raw", "-b", "CANARY"),
    "backing file by json": ("-F", "raw", "-b", 'json:{"driver":"raw","file":{"driver":"file","filename":"CANARY"}}'),
    "backing file by protocol": ("-F", "raw", "-b", "file:CANARY"),
    "data file": ("-o", "data_file=CANARY,data_file_raw=on", "SIZE"),
}


@pytest.mark.parametrize("kind", CANARY_FILES)
def test_a_file_that_a_disk_names_is_never_opened(host: Host, tmp_path: Path, kind: str) -> None:
    canary, source, trace = tmp_path / "canary", tmp_path / "source", tmp_path / "trace"
    canary.write_bytes(bytes(MIB))
    *options, last = (word.replace("CANARY", str(canary)).replace("SIZE", "1M") for word in CANARY_FILES[kind])
    words = (
        ["create", "-f", "qcow2", *options, last, source]
        if last != "1M"
        else ["create", "-f", "qcow2", *options, source, last]
    )
    qemu_img(*words)
    program = (
        "import sys; from pathlib import Path; from hvctl.config import Config; from hvctl.host import Host\n"
        "from hvctl.errors import InvalidSpec; from hvctl.rootfs import intake\n"
        "source, target = map(Path, sys.argv[1:]); host = Host(Config(store=target.parent, run=target.parent))\n"
        "for verb in (lambda: intake.check_disk(host, source),\n"
        "             lambda: intake.convert_disk(host, source, target, format='qcow2')):\n"
        "    try: verb()\n"
        "    except InvalidSpec as error: print(error.message)\n"
    )
    words = [
        "strace",
        "-f",
        "-qq",
        "-e",
        "trace=%file",
        "-o",
        str(trace),
        sys.executable,
        "-c",
        program,
        str(source),
        str(tmp_path / "t"),
    ]
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=120)
    assert len(done.stdout.splitlines()) == 2 and "file" in done.stdout
    assert str(source) in trace.read_text() and "canary" not in trace.read_text()


def test_even_unchecked_a_program_finds_no_backing_file(host: Host, tmp_path: Path) -> None:
    canary, source, folder = tmp_path / "canary", tmp_path / "source", tmp_path / "own"
    canary.write_bytes(bytes(MIB))
    folder.mkdir()
    qemu_img("create", "-f", "qcow2", "-F", "raw", "-b", canary, source)
    words = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", "/in/0", "out"]
    done = intake.run_confined(host, folder, words, read_only=[source], check=False)
    assert done.status == 1 and "No such file or directory" in done.stderr


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB; what a refusal left in it would show."""
    mounted = tmp_path / "small"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64M", "tmpfs", str(mounted)], check=True, timeout=60)
    try:
        yield mounted
        assert list(mounted.iterdir()) == []
    finally:
        subprocess.run(["umount", str(mounted)], check=True, timeout=60)


def make_bomb(size: int) -> bytes:
    """A sound qcow2 file whose every cluster is one and the same compressed one. Its tables are told as often as used."""
    tables = size // (CLUSTER * CLUSTER // 8)
    packing = zlib.compressobj(9, zlib.DEFLATED, -12)
    packed = packing.compress(b"bomb" * (CLUSTER // 4)) + packing.flush()
    references = [1, 1, 1, 1, tables, tables * CLUSTER // 8]
    disk = bytearray(make(size=size, l1_entries=tables, refcount_order=6))
    struct.pack_into(">Q", disk, CLUSTER, 2 * CLUSTER)
    struct.pack_into(f">{len(references)}Q", disk, 2 * CLUSTER, *references)
    struct.pack_into(f">{tables}Q", disk, 3 * CLUSTER, *[4 * CLUSTER] * tables)
    return bytes(disk) + struct.pack(">Q", 1 << 62 | 5 * CLUSTER) * (CLUSTER // 8) + packed.ljust(CLUSTER, b"\0")


def test_a_bomb_is_refused_and_costs_no_space(host: Host, tmp_path: Path, small: Path) -> None:
    source = tmp_path / "bomb"
    source.write_bytes(make_bomb(8 * GIB))
    with pytest.raises(InvalidSpec, match="more than 1000 times its size"):
        intake.convert_disk(host, source, small / "target", format="qcow2", limits=LIMITS)


def test_a_disk_that_does_not_fit_is_refused_first(host: Host, tmp_path: Path, small: Path) -> None:
    source = tmp_path / "large"
    source.write_bytes(b"x" * 80 * MIB)
    with pytest.raises(HostError, match=r"takes 80MiB, and only .* are free") as caught:
        intake.convert_disk(host, source, small / "target", format="raw", limits=LIMITS)
    assert "free some space" in caught.value.hint


@pytest.mark.parametrize("place", [3, 4, 5])
def test_damaged_tables_are_refused(host: Host, tmp_path: Path, raw: Path, small: Path, place: int) -> None:
    source = tmp_path / "source"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, source)
    disk = bytearray(source.read_bytes())
    table = struct.unpack_from(">Q", disk, 40)[0]
    second = struct.unpack_from(">Q", disk, table)[0] & 0x00FFFFFFFFFFFE00
    struct.pack_into(
        ">Q", disk, {3: table, 4: second, 5: second + 8}[place], 1 << 63 | {3: 2**40, 4: 0x30001, 5: second}[place]
    )
    source.write_bytes(disk)
    with pytest.raises(InvalidSpec, match=r"is damaged: |cannot be converted: "):
        intake.convert_disk(host, source, small / "target", format="qcow2", limits=replace(LIMITS, wall_s=60))
