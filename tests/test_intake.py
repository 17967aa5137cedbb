"""Honest archives through the confined worker, as others unpack them; limits, digests, bombs on a small file system."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hvctl.config import Config
from hvctl.errors import HostError, Interrupted, InvalidSpec, TimedOut
from hvctl.events import Event, Progress
from hvctl.host import Host
from hvctl.hostside import sandbox, unpack
from hvctl.rootfs import intake
from hvctl.rootfs.intake import Layer, Limits
from hvctl.units import GIB, MIB
from tests import ocilayout
from tests.tarballs import COMPRESS, END, entry, header, pax, tar, zstd
from tests.trees import fingerprint

pytestmark = [pytest.mark.guest, pytest.mark.apart]  # needs root, and bubblewrap
LIMITS = Limits(reserve_bytes=0)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(Config(store=tmp_path, run=tmp_path))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB, on a loop device. What is in it must be gone in the end, and the space back."""
    disk, mounted = tmp_path / "small.ext4", tmp_path / "small"
    mounted.mkdir()
    with disk.open("wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-N", "2048", str(disk)], check=True, timeout=60)
    subprocess.run(["mount", "-o", "loop", str(disk), str(mounted)], check=True, timeout=60)
    try:
        free = os.statvfs(mounted).f_bfree, os.statvfs(mounted).f_ffree
        yield mounted
        assert os.listdir(mounted) == ["lost+found"]
        os.sync()
        assert (os.statvfs(mounted).f_bfree, os.statvfs(mounted).f_ffree) == free
    finally:
        subprocess.run(["umount", str(mounted)], check=True, timeout=60)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.fixture
def honest(tmp_path: Path) -> Path:
    """A tree with a file of every kind."""
    tree = tmp_path / "honest"
    (tree / "d" / "e").mkdir(parents=True)
    (tree / "d" / "file").write_bytes(os.urandom(300_000))
    (tree / "d" / "empty").touch()
    os.link(tree / "d" / "file", tree / "hard")
    (tree / "soft").symlink_to("d/file")
    os.mkfifo(tree / "pipe")
    with (tree / "holes").open("wb") as file:
        for offset in (0, 5 * MIB, 9 * MIB):
            file.seek(offset)
            file.write(b"data")
        file.truncate(20 * MIB)
    os.chown(tree / "d" / "empty", 1000, 2**31)
    os.chown(tree / "soft", 12, 34, follow_symlinks=False)
    (tree / "d" / "empty").chmod(0o6751)
    os.setxattr(tree / "d", "user.note", b"\0\xff")
    os.setxattr(tree / "d" / "file", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    for path in [*tree.rglob("*"), tree]:
        os.utime(path, ns=(10**9, 1_234_567_890_123_456_000), follow_symlinks=False)
    return tree


def pack(tree: Path, archive: Path, *options: str) -> Path:
    words = [
        "tar",
        "--numeric-owner",
        "--xattrs",
        "--xattrs-include=*",
        *options,
        "-cf",
        str(archive),
        "-C",
        str(tree),
        ".",
    ]
    subprocess.run(words, check=True, timeout=60)
    return archive


# Without holes for tar to see; with them, in two of the ways that they are told.
FORMATS = {"whole": (), "sparse 1.0": ("-S",), "sparse 0.1": ("-S", "--sparse-version=0.1")}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("compression", COMPRESS)
def test_a_tree_comes_out_as_it_went_in(host: Host, tmp_path: Path, honest: Path, compression: str, kind: str) -> None:
    plain = pack(honest, tmp_path / "a.tar", "--format=posix", *FORMATS[kind])
    if FORMATS[kind]:
        assert plain.stat().st_size < 2 * MIB
    archive = write(tmp_path / "archive", COMPRESS[compression](plain.read_bytes()))
    intake.unpack_tree(host, archive, tmp_path / "tree", limits=LIMITS)
    assert fingerprint(tmp_path / "tree") == fingerprint(honest)
    if FORMATS[kind]:
        assert (tmp_path / "tree" / "holes").stat().st_blocks < 200


def test_contents_of_every_length_go_where_they_belong(host: Host, tmp_path: Path) -> None:
    sizes = [size + more for size in (0, 512, 96 * 1024, MIB, 4 * MIB) for more in (-1, 0, 1) if size + more >= 0]
    contents = {f"{number}": os.urandom(size) for number, size in enumerate(sizes * 2)}
    contents["twice"] = os.urandom(MIB)
    first, owner = os.urandom(MIB), {"mode": b"0004755\0", "uid": b"0001750\0"}
    parts = [entry(name, content=content, **owner) for name, content in contents.items()]
    early = (entry("twice", content=first), entry("other", "1", link="twice"))  # has its name before its content
    archive = write(tmp_path / "archive", tar(*early, *parts))
    intake.unpack_tree(host, archive, tmp_path / "tree", limits=LIMITS)
    for name, content in {**contents, "other": first}.items():
        path = tmp_path / "tree" / name
        facts = path.stat()
        wanted = (0o644, 0) if name == "other" else (0o4755, 1000)
        assert (path.read_bytes() == content, facts.st_mode & 0o7777, facts.st_uid, facts.st_mtime) == (
            True,
            *wanted,
            1,
        )


def test_gnu_archives_keep_what_they_can(host: Host, tmp_path: Path, honest: Path) -> None:
    (honest / ("long" * 40)).touch()
    (honest / "to-long").symlink_to("target" * 40)
    archive = tmp_path / "a.tar"
    words = ["tar", "--numeric-owner", "--format=gnu", "-S", "-cf", str(archive), "-C", str(honest), "."]
    subprocess.run(words, check=True, timeout=60)
    intake.unpack_tree(host, archive, tmp_path / "tree", limits=LIMITS)
    alone = tmp_path / "by-tar"
    alone.mkdir()
    subprocess.run(["tar", "--numeric-owner", "-xpf", str(archive), "-C", str(alone)], check=True, timeout=60)
    assert fingerprint(tmp_path / "tree") == fingerprint(alone)


@pytest.mark.parametrize("compression", ["gzip", "xz", "zstd"])
def test_a_squashfs_image_is_a_tree_too(host: Host, tmp_path: Path, honest: Path, compression: str) -> None:
    archive = tmp_path / "root.squashfs"
    words = ["mksquashfs", str(honest), str(archive), "-quiet", "-no-progress", "-comp", compression]
    subprocess.run(words, check=True, timeout=60)
    intake.unpack_tree(host, archive, tmp_path / "tree", limits=LIMITS)
    alone = tmp_path / "alone"
    subprocess.run(["unsquashfs", "-q", "-n", "-d", str(alone), str(archive)], check=True, timeout=60)
    assert fingerprint(tmp_path / "tree") == fingerprint(alone)


def test_several_streams_in_one_file_are_one_archive(host: Host, tmp_path: Path) -> None:
    first, second = entry("a", content=b"a" * 3000), tar(entry("b"))
    for name, compress in COMPRESS.items():
        tree = tmp_path / name
        blob = compress(first) + compress(second) + bytes(100 if name == "gzip" else 0)
        intake.unpack_tree(host, write(tmp_path / "archive", blob), tree, limits=LIMITS)
        assert sorted(os.listdir(tree)) == ["a", "b"]


@pytest.mark.parametrize("count", range(1, len(ocilayout.make_layers()) + 1))
def test_layers_come_out_as_umoci_unpacks_them(host: Host, tmp_path: Path, count: int) -> None:
    """After each layer: a later one may hide what an earlier one did wrong."""
    layers = ocilayout.write(tmp_path / "layout", "it", ocilayout.make_layers()[:count])
    intake.unpack_layers(host, layers, tmp_path / "tree", limits=LIMITS)
    words = ["umoci", "raw", "unpack", "--image", f"{tmp_path / 'layout'}:it", str(tmp_path / "umoci")]
    subprocess.run(words, check=True, timeout=60, capture_output=True)
    mine, theirs = fingerprint(tmp_path / "tree"), fingerprint(tmp_path / "umoci")
    implicit = {name for name, facts in mine.items() if facts[0].startswith("0o4") and facts[3] == 0}
    assert len(mine) > 20 and implicit <= {name for name in mine if name.startswith(("opt/long", "new"))}
    for name in implicit:  # no entry says when it was made; umoci says now
        theirs[name] = (*theirs[name][:3], 0, *theirs[name][4:])
    assert mine == theirs


def test_a_digest_that_is_not_the_files_is_refused_before_it_is_read(host: Host, tmp_path: Path) -> None:
    blob = gzip.compress(tar(entry("a")))
    path = write(tmp_path / "layer", blob)
    good = hashlib.sha256(blob).hexdigest()
    intake.unpack_layers(host, [Layer(path=path, digest=f"sha256:{good}")], tmp_path / "tree", limits=LIMITS)
    assert os.listdir(tmp_path / "tree") == ["a"]
    path.write_bytes(blob[:20] + bytes([blob[20] ^ 1]) + blob[21:])
    with pytest.raises(InvalidSpec, match=f"its digest is sha256:.{{64}}, not sha256:{good}"):
        intake.unpack_layers(host, [Layer(path=path, digest=f"sha256:{good}")], tmp_path / "other", limits=LIMITS)
    assert os.listdir(tmp_path / "other") == []


def test_a_content_of_another_digest_is_refused(host: Host, tmp_path: Path) -> None:
    archive = tar(entry("a", content=b"a" * 3 * MIB))
    path = write(tmp_path / "layer", zstd(archive))
    good = f"sha256:{hashlib.sha256(archive).hexdigest()}"
    intake.unpack_layers(host, [Layer(path=path, diff_id=good)], tmp_path / "tree", limits=LIMITS)
    with pytest.raises(InvalidSpec, match="layer 2 of 2: its content's digest"):
        layers = [Layer(path=path, diff_id=good), Layer(path=path, diff_id=f"sha256:{'0' * 64}")]
        intake.unpack_layers(host, layers, tmp_path / "other", limits=LIMITS)


@pytest.mark.parametrize(
    "digest", ["sha256:abc", "md5:" + "0" * 32, "../x", "sha256:" + "A" * 64, "sha256:" + "0" * 64 + "\n"]
)
def test_what_is_no_digest_is_refused(host: Host, tmp_path: Path, digest: str) -> None:
    path = write(tmp_path / "layer", tar())
    with pytest.raises(InvalidSpec, match="not a SHA-256 digest"):
        intake.unpack_layers(host, [Layer(path=path, digest=digest)], tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


def test_with_its_digest_an_archive_needs_no_end_mark(host: Host, tmp_path: Path) -> None:
    blob = entry("a")
    layer = Layer(path=write(tmp_path / "layer", blob), digest=hashlib.sha256(blob).hexdigest())
    intake.unpack_layers(host, [layer], tmp_path / "tree", limits=LIMITS)
    with pytest.raises(InvalidSpec, match="no end mark"):
        intake.unpack_tree(host, layer.path, tmp_path / "other", limits=LIMITS)


@pytest.mark.parametrize("problem", ["missing", "empty", "encrypted"])
def test_a_layer_that_cannot_be_read_is_refused_first(host: Host, tmp_path: Path, problem: str) -> None:
    path = tmp_path / "layer"
    if problem != "missing":
        path.write_bytes(b"" if problem == "empty" else b"x")
    media = "application/vnd.oci.image.layer.v1.tar+gzip+encrypted" if problem == "encrypted" else ""
    with pytest.raises(InvalidSpec, match=r"missing or empty|encrypted"):
        intake.unpack_layers(host, [Layer(path=path, media=media)], tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


def test_what_is_no_file_is_refused_at_once(host: Host, tmp_path: Path) -> None:
    (tmp_path / "folder" / "in").mkdir(parents=True)
    with pytest.raises(InvalidSpec, match="no regular file"):
        intake.unpack_tree(host, tmp_path / "folder", tmp_path / "tree", limits=LIMITS)


def test_a_tree_that_holds_something_is_left_alone(host: Host, tmp_path: Path) -> None:
    path = write(tmp_path / "archive", tar(entry("a")))
    intake.unpack_tree(host, path, tmp_path / "tree", limits=LIMITS)
    with pytest.raises(HostError, match="is not empty"):
        intake.unpack_tree(host, path, tmp_path / "tree", limits=LIMITS)


def many(count: int) -> bytes:
    """That many empty files."""
    return tar(*(header(f"d{number % 100}/f{number}") for number in range(count)))


# What is too much, and the limit that says so; each archive is small.
ZEROS = entry("x", content=bytes(40 * MIB))
HOLES = pax(("GNU.sparse.map", "0,0"), ("GNU.sparse.size", str(10 * GIB))) + entry("x")
TIGHT = replace(LIMITS, ratio=100, ratio_floor_bytes=MIB)
BOMBS = {
    "zeros": (lambda: gzip.compress(tar(ZEROS)), TIGHT, "100 times"),
    "zeros, xz": (lambda: COMPRESS["xz"](tar(ZEROS)), TIGHT, "100 times"),
    "zeros, zstd": (lambda: zstd(tar(ZEROS)), TIGHT, "100 times"),
    "zeros behind the end": (lambda: gzip.compress(tar() + bytes(40 * MIB)), TIGHT, "100 times"),
    "headers": (lambda: gzip.compress(tar(*[pax(("comment", "c" * 900_000), kind="g")] * 40)), TIGHT, "100 times"),
    "bytes": (lambda: tar(ZEROS), replace(LIMITS, expanded_bytes=MIB), "more than 1048576 bytes"),
    "bytes of many": (
        lambda: tar(*[entry("x", content=bytes(MIB))] * 9),
        replace(LIMITS, expanded_bytes=8 * MIB),
        "more than",
    ),
    "entries": (lambda: gzip.compress(many(300)), replace(LIMITS, entries=299), "more than 299 entries"),
    "a long file": (lambda: tar(ZEROS), replace(LIMITS, file_bytes=2 * MIB), "longer file than it may"),
    "a long sparse file": (lambda: tar(HOLES), replace(LIMITS, file_bytes=2 * GIB), "longer file than it may"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_and_costs_no_space(host: Host, small: Path, tmp_path: Path, name: str) -> None:
    make, limits, reason = BOMBS[name]
    archive = write(tmp_path / "bomb", make())
    with pytest.raises(InvalidSpec, match=reason):
        intake.unpack_layers(host, [Layer(path=archive)], small / "tree", limits=limits)
    subprocess.run(["rm", "-r", str(small / "tree")], check=True, timeout=60)


def test_a_bomb_in_the_second_layer_counts_both(host: Host, tmp_path: Path) -> None:
    layer = Layer(path=write(tmp_path / "layer", tar(entry("x", content=bytes(3 * MIB)))))
    with pytest.raises(InvalidSpec, match="layer 2 of 2: it expands to more than 5242880 bytes"):
        intake.unpack_layers(host, [layer, layer], tmp_path / "tree", limits=replace(LIMITS, expanded_bytes=5 * MIB))


@pytest.mark.parametrize("what", ["bytes", "contents", "files", "directories"])
def test_a_full_file_system_is_said_so(host: Host, small: Path, tmp_path: Path, what: str) -> None:
    content = {
        "bytes": lambda: tar(entry("x", content=os.urandom(80 * MIB))),
        "contents": lambda: tar(*(entry(f"{number}", content=os.urandom(MIB)) for number in range(80))),
        "files": lambda: many(3_000),
        "directories": lambda: tar(*(header(f"{number}/", "5") for number in range(3_000))),
    }[what]()
    with pytest.raises(HostError, match=r"full|inodes") as caught:
        intake.unpack_tree(host, write(tmp_path / "archive", content), small / "tree", limits=LIMITS)
    assert "free some space" in caught.value.hint
    subprocess.run(["rm", "-r", str(small / "tree")], check=True, timeout=60)


def test_some_space_stays_free_for_guests(host: Host, small: Path, tmp_path: Path) -> None:
    archive = write(tmp_path / "archive", tar(entry("x", content=os.urandom(45 * MIB))))
    with pytest.raises(HostError, match="nearly full"):
        intake.unpack_tree(host, archive, small / "tree", limits=Limits(reserve_bytes=30 * MIB))
    assert os.statvfs(small).f_bavail * os.statvfs(small).f_frsize > 10 * MIB
    subprocess.run(["rm", "-r", str(small / "tree")], check=True, timeout=60)


def test_a_worker_that_takes_too_long_is_ended(host: Host, tmp_path: Path) -> None:
    path = write(tmp_path / "archive", tar(entry("x", content=os.urandom(MIB))))
    with pytest.raises(TimedOut, match=r"^cannot unpack 'archive': it took more than 0\.0s$"):
        intake.unpack_tree(host, path, tmp_path / "tree", limits=replace(LIMITS, wall_s=0.001))
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], timeout=30, capture_output=True).stdout == b""


def test_progress_goes_up_to_the_whole(host: Host, tmp_path: Path) -> None:
    path = write(tmp_path / "layer", tar(entry("x", content=bytes(40 * MIB))))
    seen: list[Event] = []
    intake.unpack_layers(
        host, [Layer(path=path)] * 2, tmp_path / "tree", limits=LIMITS, events=seen.append, subject="it"
    )
    steps = [event.done for event in seen if isinstance(event, Progress)]
    assert len(steps) > 4 and steps == sorted(steps) and steps[-1] == 2 * path.stat().st_size
    assert {(event.subject, event.total) for event in seen if isinstance(event, Progress)} == {("it", steps[-1])}


def test_cancelling_ends_it(host: Host, tmp_path: Path) -> None:
    path = write(tmp_path / "layer", tar(entry("x", content=bytes(99 * MIB))))
    with pytest.raises(Interrupted):
        intake.unpack_tree(host, path, tmp_path / "tree", limits=LIMITS, events=lambda event: host.cancelled.set())


def test_memory_does_not_grow_with_the_archive(host: Host, tmp_path: Path) -> None:
    peaks = []
    for count in (500, 5_000):
        archive = write(tmp_path / "archive", many(count))
        peaks.append(peak_bytes(archive, tmp_path / f"tree{count}"))
    assert peaks[1] < peaks[0] + MIB, peaks


def worker(archive: Path, tree: Path) -> list[str]:
    """The words of the worker that unpacks this."""
    tree.mkdir()
    request = unpack.Request(archives=(unpack.Archive(),), bounds=intake._bounds(LIMITS), has_whiteouts=False)
    confinement = sandbox.Confinement(
        directory=tree, read_only=((archive, sandbox.place_input(0)),), capabilities=unpack.CAPABILITIES
    )
    return sandbox.python_command(confinement, "unpack", [unpack.format_request(request)])


def peak_bytes(archive: Path, tree: Path) -> int:
    """The most memory that any process of an unpacking took."""
    done = subprocess.run(worker(archive, tree), check=True, capture_output=True, timeout=300)
    return int(json.loads(done.stdout)["peak_bytes"])


@pytest.mark.parametrize("compression", ["plain", "zstd"])
def test_the_root_is_the_tree_before_a_header_is_read(tmp_path: Path, compression: str) -> None:
    archive = write(tmp_path / "archive", COMPRESS[compression](tar(entry("first"))))
    trace = tmp_path / "trace"
    strace = ["strace", "-f", "-qq", "-e", "trace=chroot,capset,read,openat,execve", "-o", str(trace)]
    subprocess.run([*strace, *worker(archive, tmp_path / "tree")], check=True, capture_output=True, timeout=60)
    lines = trace.read_text().splitlines()
    (rooted,) = (number for number, line in enumerate(lines) if 'chroot("/work")' in line)
    process = lines[rooted].split()[0]
    after = [line for line in lines[rooted:] if line.startswith(process)]
    kept = next(number for number, line in enumerate(after) if "capset(" in line)
    header = next(number for number, line in enumerate(after) if "read" in line.split('"')[0] and "first" in line)
    made = next(number for number, line in enumerate(after) if "openat(" in line and '"first"' in line)
    assert kept < header < made
    assert not any("first" in line for line in lines[:rooted] if line.startswith(process))
    assert not any("execve(" in line for line in after)


@pytest.mark.long
def test_a_million_entries_are_unpacked_or_refused(host: Host, tmp_path: Path) -> None:
    archive = tmp_path / "archive.tar"
    with archive.open("wb") as file:
        for number in range(1_000_000):
            file.write(header(f"d{number % 1000}/f{number}"))
        file.write(END)
    with pytest.raises(InvalidSpec, match="more than 900000 entries"):
        intake.unpack_tree(host, archive, tmp_path / "refused", limits=replace(LIMITS, entries=900_000))
    subprocess.run(["rm", "-r", str(tmp_path / "refused")], check=True, timeout=300)
    assert peak_bytes(archive, tmp_path / "tree") < 64 * MIB
