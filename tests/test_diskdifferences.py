"""What differs between two states of a VM's disk: what the kernel shows, read from the layers without it."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hvctl.hostside import diskdifferences, sandbox
from hvctl.hostside.differences import ADDED, CHANGED, REMOVED
from hvctl.hostside.diskview import Raw
from hvctl.hostside.refusal import Refused
from tests import layereddisk, trees

pytestmark = [pytest.mark.guest, pytest.mark.apart]  # loop devices of the whole machine

MIB = 1024**2
SIZE_BYTES = 24 * MIB
KINDS = {
    "ext4": ("-t", "ext4"),
    "small blocks, no extents": ("-t", "ext4", "-b", "1024", "-O", "^extents,^64bit"),
    "content in inodes": ("-t", "ext4", "-O", "inline_data"),
    "ext3": ("-t", "ext3"),
    "old checksums": ("-t", "ext4", "-O", "^metadata_csum,^64bit"),
}
_XFS = '(printf XFSB; head -c 8188 /dev/zero) | dd of="$0" conv=notrunc status=none'
Compare = Callable[..., set[tuple[str, str]]]


@pytest.fixture
def compare(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Compare:
    """What the worker says of two stacks of files in a directory, topmost first."""

    def ask(old: list[str], new: list[str]) -> set[tuple[str, str]]:
        names = sorted({*old, *new})
        monkeypatch.setattr(sandbox, "place_input", lambda number: str(tmp_path / names[number]))
        stacks = [[names.index(name) for name in stack] for stack in (old, new)]
        diskdifferences.main([json.dumps(layereddisk.question([tmp_path / name for name in names], *stacks))])
        return {(kind, path) for kind, path in json.loads(capsys.readouterr().out)["differences"]}

    return ask


def wanted(old: trees.View, new: trees.View) -> set[tuple[str, str]]:
    found = {(ADDED, path) for path in set(new) - set(old)} | {(REMOVED, path) for path in set(old) - set(new)}
    return found | {(CHANGED, path) for path in set(old) & set(new) if old[path] != new[path]}


def scribble(root: Path, dice: random.Random) -> None:
    """What a guest does: small things of all kinds, a long file with holes, a device."""
    (root / "work").mkdir(exist_ok=True)
    for _change in range(25):
        trees.scribble(root / "work", dice)
    with (root / "long").open("r+b" if (root / "long").exists() else "wb") as file:
        file.truncate(dice.randrange(3, 6) * MIB)
        for _piece in range(3):
            file.seek(dice.randrange(3 * MIB))
            file.write(dice.choice("xyz").encode() * dice.randrange(200_000))
    if not (root / "device").exists():
        os.mknod(root / "device", stat.S_IFCHR | 0o600, os.makedev(dice.randrange(300), dice.randrange(300)))


def commit(root: Path) -> None:
    """Bring all to the disk, metadata to the journal alone."""
    descriptor = os.open(root, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@pytest.mark.parametrize("is_crashed", [False, True], ids=["unmounted", "journal not replayed"])
@pytest.mark.parametrize("kind", KINDS)
def test_differences_are_those_that_the_kernel_shows(
    tmp_path: Path, compare: Compare, kind: str, is_crashed: bool
) -> None:
    seed = secrets.randbits(32)
    dice = random.Random(seed)
    raw = tmp_path / "raw"
    layereddisk.make_file_system(raw, SIZE_BYTES, *KINDS[kind])
    shutil.copy(raw, tmp_path / "before")
    layereddisk.to_base(raw, tmp_path / "0")
    states: list[trees.View] = []
    for number in range(3):
        with layereddisk.mounted(raw, options="" if "ext3" in KINDS[kind] else ",nodelalloc") as root:
            if number == 0:
                states.append(trees.view(root))
            for _round in range(3):
                scribble(root, dice)
                commit(root)
            states.append(trees.view(root))
            if is_crashed:
                shutil.copy(raw, tmp_path / "after")
        if not is_crashed:
            shutil.copy(raw, tmp_path / "after")
        layereddisk.to_layer(
            tmp_path / "before", tmp_path / "after", tmp_path / f"{number + 1}", tmp_path / f"{number}"
        )
        (tmp_path / "after").replace(tmp_path / "before")
    answer = subprocess.run(["dumpe2fs", "-h", str(tmp_path / "before")], capture_output=True, check=True, timeout=60)
    assert (b"needs_recovery" in answer.stdout) == is_crashed
    for old, new in [(0, 1), (0, 3), (3, 1), (2, 2)]:
        stacks = ([str(number) for number in range(top, -1, -1)] for top in (old, new))
        assert compare(*stacks) == wanted(states[old], states[new]), (seed, old, new)


def test_content_in_the_journal_is_read_there(tmp_path: Path, compare: Compare) -> None:
    """A block that begins as the journal's own do is masked in it."""
    raw, magic = tmp_path / "raw", bytes.fromhex("c03b3998")
    layereddisk.make_file_system(raw, SIZE_BYTES, "-t", "ext4")
    with layereddisk.mounted(raw) as root:
        for name in ("same", "other"):
            (root / name).write_bytes(
                (magic + b"a" * 4092) * 100
            )  # its middle shares no cluster of the layer with others
    shutil.copy(raw, tmp_path / "before")
    layereddisk.to_base(raw, tmp_path / "0")
    with layereddisk.mounted(raw, options=",data=journal") as root:
        for name, content in (("same", b"a"), ("other", b"b")):
            with (root / name).open("r+b") as file:
                file.seek(50 * 4096)
                file.write(magic + content * 4092)
        commit(root)
        shutil.copy(raw, tmp_path / "after")
    layereddisk.to_layer(tmp_path / "before", tmp_path / "after", tmp_path / "1", tmp_path / "0")
    assert compare(["0"], ["1", "0"]) == {(CHANGED, "/other")}


def test_a_root_in_a_partition_that_grew_is_compared(tmp_path: Path, compare: Compare) -> None:
    raw, start, first_bytes = tmp_path / "raw", 4 * MIB, 32 * MIB
    raw.touch()
    os.truncate(raw, 64 * MIB)
    table = f"label: gpt\nstart={start // 512}, size={first_bytes // 512}\n"
    subprocess.run(["sfdisk", "-q", str(raw)], input=table.encode(), check=True, timeout=30)
    layereddisk.make_file_system(raw, first_bytes, "-t", "ext4", offset=start)
    shutil.copy(raw, tmp_path / "before")
    layereddisk.to_base(raw, tmp_path / "0")
    subprocess.run(["sfdisk", "-q", "-N1", str(raw)], input=f"{start // 512},+".encode(), check=True, timeout=30)
    with layereddisk.mounted(raw, offset=start) as root:
        (root / "new").write_text("x")
    layereddisk.to_layer(tmp_path / "before", raw, tmp_path / "1", tmp_path / "0")
    assert compare(["0"], ["1", "0"]) == {(ADDED, "/new")}
    assert compare(["1", "0"], ["0"]) == {(REMOVED, "/new")}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (["sh", "-c", _XFS], "its root is on xfs, which hvctl does not read"),
        (["mkswap"], "there is no Linux root on its disk \\(found: swap\\)"),
        (["mke2fs", "-q", "-F", "-t", "ext4"], "there is no Linux root on its disk \\(found: ext4\\)"),
        (["debugfs", "-w", "-R", "link etc again"], "a directory contains itself"),
        (["debugfs", "-w", "-R", "clri etc/os-release"], ""),
    ],
)
def test_what_cannot_be_compared_is_said(tmp_path: Path, compare: Compare, damage: list[str], reason: str) -> None:
    raw = tmp_path / "raw"
    layereddisk.make_file_system(raw, SIZE_BYTES, "-t", "ext4")
    layereddisk.to_base(raw, tmp_path / "good")
    done = subprocess.run([*damage, str(raw)], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    layereddisk.to_base(raw, tmp_path / "bad")
    if not reason:  # a file of no kind differs from one, and that is all
        assert compare(["good"], ["bad"]) == {(CHANGED, "/etc/os-release")}
        return
    for stacks in ((["good"], ["bad"]), (["bad"], ["good"])):
        with pytest.raises(Refused, match=reason):
            compare(*stacks)


def test_layers_that_nobody_of_ours_wrote_are_refused(tmp_path: Path, compare: Compare) -> None:
    raw = tmp_path / "raw"
    layereddisk.make_file_system(raw, SIZE_BYTES, "-t", "ext4")
    layereddisk.to_base(raw, tmp_path / "good")
    for words, reason in ((["-c"], "compressed"), (["-o", "extended_l2=on"], "features")):
        (tmp_path / "bad").unlink(missing_ok=True)
        command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *words, str(raw), str(tmp_path / "bad")]
        subprocess.run(command, check=True, timeout=60)
        with pytest.raises(Refused, match=reason):
            compare(["good"], ["bad"])


def test_damage_is_refused_or_compared_and_nothing_else(tmp_path: Path) -> None:
    """Of a disk with a journal to replay; any other exception would end it."""
    raw = tmp_path / "raw"
    layereddisk.make_file_system(raw, 8 * MIB, "-t", "ext4", "-b", "1024", "-J", "size=1")
    with layereddisk.mounted(raw, options=",nodelalloc") as root:
        for number in range(40):
            (root / f"f{number}").write_text(str(number) * 300)
        commit(root)
        content = raw.read_bytes()
    used = [start for start in range(0, len(content), 1024) if any(content[start : start + 1024])]
    seed = secrets.randbits(32)
    dice, found = random.Random(seed), {"compared": 0, "refused": 0}
    with raw.open("r+b", buffering=0) as file:
        for _damage in range(1000):
            places = [dice.choice(used) + dice.randrange(dice.choice((16, 128, 1024))) for _byte in range(8)]
            for place in places:
                os.pwrite(file.fileno(), dice.randbytes(1), place)
            try:
                disk = diskdifferences._replay(Raw(file.fileno()))
                system = diskdifferences._open_root(disk)
                list(diskdifferences.list_differences(system, system))
                found["compared"] += 1
            except Refused:
                found["refused"] += 1
            for place in places:
                os.pwrite(file.fileno(), content[place : place + 1], place)
    assert all(found.values()), (seed, found)
