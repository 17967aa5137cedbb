"""What comes from a repository is believed in nothing: manifests, disks, archives, names of files. No libvirt is asked."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hvctl.backends import get_backend
from hvctl.backups import manifest
from hvctl.backups.directory import Directory
from hvctl.backups.manifest import Backup, Part, Subject
from hvctl.backups.opening import open_repository
from hvctl.backups.restic import Restic
from hvctl.errors import AlreadyExists, HvctlError, InvalidSpec, NotFound, Unsupported, UsageError
from hvctl.events import ignore
from hvctl.host import Host
from hvctl.hostside import files, layers, marks, transfer
from hvctl.hostside.transfer import Source
from hvctl.instances.examples import make_record
from hvctl.model import Artefact, Consistency, Disk, Image, Mode, Provision
from hvctl.rootfs import unpacked
from hvctl.rootfs.building import Building
from tests import stores
from tests.payloads import PAYLOADS

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="backups are root's")

ID = "20260131-120000-123456"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return stores.make(tmp_path)


def part(name: str, digest: str = "a" * 64) -> Part:
    return Part(name=name, key=f"layer:{name}:", sha256=digest, size_bytes=10, used_bytes=10)


def make_image(mode: Mode) -> Image:
    disk = Disk(
        artefact=Artefact(file="disk.qcow2", size_bytes=10, sha256="b" * 64), format="qcow2", virtual_bytes=1024**2
    )
    return Image(
        id="",
        name="",
        os="debian",
        version="12",
        architecture="x86_64",
        created_at="2026-01-01T00:00:00Z",
        login_user="root",
        provision=Provision.CREDENTIALS,
        disk=disk if mode is Mode.VM else None,
        kernel=None,
        initrd=None,
        has_tree=mode is Mode.CONTAINER,
    )


def make_backup(mode: Mode = Mode.VM) -> Backup:
    record = make_record(mode, "default", Path("/store"), {"K": "V"})
    base = part("disk.qcow2", "b" * 64) if mode is Mode.VM else part("tree.tar")
    return Backup(
        id=ID,
        created_at="2026-01-31T12:00:00Z",
        host="here",
        consistency=Consistency.FROZEN,
        subject=Subject(
            uuid=record.uuid,
            spec=replace(record.spec, mounts=()),
            mac=record.mac,
            address="10.0.0.2",
            login_user="root",
            provision=record.provision,
            kernel_release="6.1.0-1",
            authorized_keys=(),
            created_at="2026-01-31T11:00:00Z",
            labels=(("owner", "me"),),
            keep=(("daily", 7),),
        ),
        image_id="c" * 64,
        base=make_image(mode),
        base_parts=(base,),
        layers=(part("layer0"),),
        state=part("state"),
        volumes=(({"name": "data", "kind": "volume", "format": "raw", "volume": ""}, part("volume-data")),),
        comment="one line",
        definition="<domain/>",
    )


@pytest.mark.parametrize("mode", list(Mode), ids=str)
def test_a_manifest_comes_back_as_it_was(mode: Mode) -> None:
    backup = make_backup(mode)
    assert manifest.parse_backup(manifest.format_backup(backup), "it") == backup


Change = Callable[[dict[str, Any]], object]
_FIELDS = ("name", "image", "template", "cpuset", "mac", "address", "login_user", "kernel_release", "uuid", "mode")
HOSTILE: dict[str, Change] = {
    "another format": lambda data: data.update(format="x"),
    "no layers": lambda data: data.pop("layers"),
    "a layer without a digest": lambda data: data["layers"][0].pop("sha256"),
    "a digest that leads out": lambda data: data["layers"][0].update(sha256="../../../etc/passwd"),
    "a name that leads out": lambda data: data["layers"][0].update(name="../x"),
    "a place that is an option": lambda data: data["layers"][0].update(place="--password-command=x"),
    "a size that is none": lambda data: data["layers"][0].update(size_bytes="10"),
    "a negative size": lambda data: data["layers"][0].update(size_bytes=-1),
    "a true size": lambda data: data["layers"][0].update(size_bytes=True),
    "a key that is none": lambda data: data["layers"][0].update(key="layer:\n"),
    "too many layers": lambda data: data.update(layers=data["layers"] * 501),
    "an identifier that leads out": lambda data: data.update(id="../x"),
    "another disk than the image's": lambda data: data["image"]["parts"][0].update(sha256="d" * 64),
    "a part too many": lambda data: data["image"]["parts"].append(data["layers"][0]),
    "a program for the kernel to run": lambda data: data["image"]["description"].update(kernel_arguments=["init=/x"]),
    "a file of the image that leads out": lambda data: data["image"]["description"]["disk"]["artefact"].update(
        file="../x"
    ),
    "memory that is none": lambda data: data["instance"].update(memory_bytes=1e9),
    "a variable with markup in its name": lambda data: data["instance"].update(variables=[["<x>", "V"]]),
    "a schedule that is none": lambda data: data["instance"].update(keep=[["yearly", 1]]),
    "an unknown way to be provided": lambda data: data["instance"].update(provision="magic"),
    "a key with options": lambda data: data["instance"].update(authorized_keys=['command="x" ssh-ed25519 AAAA']),
    "a comment of two lines": lambda data: data.update(comment="a\nb"),
    "what is left out with escapes": lambda data: data.update(left_out=["\x1b[2J"]),
    "no object": lambda data: data.update(instance=[]),
    **{
        f"{field} {payload[:20]!r}": (
            lambda data, field=field, payload=payload: data["instance"].update({field: payload})
        )
        for field in _FIELDS
        for payload in PAYLOADS
        if payload
    },
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_manifest_that_cannot_be_is_refused(what: str) -> None:
    data = json.loads(manifest.format_backup(make_backup()))
    HOSTILE[what](data)
    with pytest.raises(InvalidSpec) as refused:
        manifest.parse_backup(json.dumps(data).encode(), "it")
    assert "\n" not in refused.value.message and refused.value.message.isprintable()


def test_a_newer_one_is_told_from_a_damaged_one() -> None:
    data = json.loads(manifest.format_backup(make_backup()))
    with pytest.raises(Unsupported, match="newer"):
        manifest.parse_backup(json.dumps({**data, "schema": 2}).encode(), "it")
    for content in (b"", b"[]", b"{", b"\xff", b"[" * 100_000, b"null"):
        with pytest.raises(InvalidSpec):
            manifest.parse_backup(content, "it")


def test_what_a_manifest_says_of_the_host_is_not_asked_for() -> None:
    """Shared directories and whatever else it names are no part of what is restored."""
    data = json.loads(manifest.format_backup(make_backup(Mode.CONTAINER)))
    data["instance"] |= {"mounts": [{"source": "/", "target": "/host"}], "emulator": "/bin/sh"}
    parsed = manifest.parse_backup(json.dumps(data).encode(), "it")
    assert parsed.subject.spec.mounts == ()


@pytest.fixture
def repository(host: Host, tmp_path: Path) -> Directory:
    made = open_repository(host, str(tmp_path / "repository"))
    assert isinstance(made, Directory) and made.make()
    assert made.make() is False
    return made


def test_only_what_looks_like_a_manifest_is_listed(repository: Directory, tmp_path: Path) -> None:
    backups = repository.path / "backups"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / f"{ID}.json").write_bytes(manifest.format_backup(make_backup()))
    (backups / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("example", "A B", "-x"):
        (backups / name).mkdir()
        (backups / name / f"{ID}.json").write_bytes(manifest.format_backup(make_backup()))
        (backups / name / "x.json").write_text("{}")
    (backups / "example" / "20260131-120000-000001.json").symlink_to("/etc/passwd")
    os.mkfifo(backups / "example" / "20260131-120000-000002.json")
    (backups / "other").mkdir()
    (backups / "other" / f"{ID}.json").write_bytes(manifest.format_backup(make_backup()))  # of another's name
    found = {(entry.name, entry.id): entry.backup is not None for entry in repository.list_entries()}
    name = make_backup().name
    assert {key for key, is_whole in found.items() if is_whole} <= {(name, ID)}
    assert ("other", ID) in found and not found["other", ID]
    assert not any(name in ("link", "A B", "-x") for name, _id in found)


def test_a_damaged_manifest_keeps_all_content(repository: Directory) -> None:
    from hvctl.backups import create

    blob = repository.path / "blobs" / "aa" / f"{'a' * 64}.zst"
    blob.parent.mkdir()
    blob.write_bytes(b"x")
    (repository.path / "backups" / "web").mkdir()
    (repository.path / "backups" / "web" / f"{ID}.json").write_text("{}")
    assert create.collect(repository, repository.list_entries()) == 0 and blob.exists()
    (repository.path / "backups" / "web" / f"{ID}.json").unlink()
    assert create.collect(repository, repository.list_entries()) == 1 and not blob.exists()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", UsageError),
        ("ftp:/x", InvalidSpec),
        ("restic:sftp:-oProxyCommand=x:/y", InvalidSpec),
        ("restic:sftp:root@-oProxyCommand=x:/y", InvalidSpec),
        ("restic:sftp://-oProxyCommand=x/y", InvalidSpec),
        ("restic:s3:https://x/y", InvalidSpec),
        ("restic:rclone:x:y", InvalidSpec),
        ("/a\nb", InvalidSpec),
    ],
)
def test_a_repository_that_cannot_be_is_refused(host: Host, text: str, error: type[HvctlError]) -> None:
    with pytest.raises(error):
        open_repository(host, text)


def test_a_restic_repository_needs_its_password(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RESTIC_PASSWORD", "RESTIC_PASSWORD_FILE", "RESTIC_PASSWORD_COMMAND"):
        monkeypatch.delenv(name, raising=False)
    repository = open_repository(host, f"restic:{tmp_path / 'restic'}")
    assert isinstance(repository, Restic)
    with pytest.raises(UsageError, match="password"):
        repository.check()
    with pytest.raises(UsageError):
        open_repository(host, str(tmp_path), password_file="/x")
    with pytest.raises(NotFound, match="no file"):
        open_repository(host, f"restic:{tmp_path / 'restic'}", password_file="/nonexistent").check()


def test_a_repository_is_made_only_where_nothing_is(host: Host, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(AlreadyExists):
        open_repository(host, str(tmp_path / "full")).make()
    with pytest.raises(NotFound) as missing:
        open_repository(host, str(tmp_path / "full")).check()
    assert "is its disk mounted" in missing.value.hint


def qcow2(path: Path, *words: str) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *words, str(path), "1M"], check=True, timeout=30)
    return path


def test_a_layer_is_stored_without_what_it_stands_on(host: Host, repository: Directory, tmp_path: Path) -> None:
    """And comes back on what it is to stand on there."""
    base = qcow2(tmp_path / "base.qcow2")
    layer = qcow2(tmp_path / "layer.qcow2", "-F", "qcow2", "-b", str(base))
    source = Source(kind=transfer.DISK, path=str(layer))
    stored, _count = repository.store(source, part("layer0"), tmp_path / "scratch", ignore, "web")
    target = tmp_path / "back"
    repository.load(stored, target, ignore, "web")
    assert str(base).encode() not in target.read_bytes()
    other = Path(shutil.copy(layer, tmp_path / "other.qcow2"))
    subprocess.run(
        ["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "/elsewhere", "-F", "qcow2", str(other)], check=True
    )
    again, _count = repository.store(
        Source(kind=transfer.DISK, path=str(other)), part("layer0"), tmp_path / "scratch", ignore, "web"
    )
    assert again.size_bytes == stored.size_bytes


@pytest.mark.parametrize("what", ["backing file", "data file", "no disk", "cut short"])
def test_a_disk_that_is_no_plain_one_is_refused(host: Host, tmp_path: Path, what: str) -> None:
    words = {
        "backing file": ("-u", "-F", "raw", "-b", "/etc/passwd"),
        "data file": ("-o", f"data_file={tmp_path / 'data'}"),
    }.get(what, ())
    disk = qcow2(tmp_path / "disk", *words)
    if what == "no disk":
        disk.write_bytes(b"x" * 70000)
    if what == "cut short":
        disk.write_bytes(disk.read_bytes()[:70000])
    mode_layers = get_backend(Mode.VM).layers
    with pytest.raises(InvalidSpec) as refused:
        mode_layers.write_layer(host, make_image(Mode.VM), "", disk, tmp_path / "aside")
    assert "\n" not in refused.value.message
    assert not (tmp_path / "aside").exists()


def archive(path: Path, entries: dict[str, bytes | tuple[bytes, str]]) -> Path:
    """A tar archive of files, and of links and the like by their type."""
    with tarfile.open(path, "w") as tar:
        for name, content in entries.items():
            entry = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
            else:
                entry.type, entry.linkname, entry.mode = content[0], content[1], 0o755
                tar.addfile(entry)
    return path


_UPPER: dict[str, bytes | tuple[bytes, str]] = {"upper": (tarfile.DIRTYPE, ""), "upper/d": (tarfile.DIRTYPE, "")}
ARCHIVES: dict[str, dict[str, bytes | tuple[bytes, str]]] = {
    "a mark that leads up": {"marks": b"w../x\0", **_UPPER},
    "a mark that is absolute": {"marks": b"w/x\0", **_UPPER},
    "a mark through a link": {"marks": b"wl/x\0", **_UPPER, "upper/l": (tarfile.SYMTYPE, "../../outside")},
    "a mark on a link": {"marks": b"ol\0", **_UPPER, "upper/l": (tarfile.SYMTYPE, "../../outside")},
    "a mark of an unknown kind": {"marks": b"xd\0", **_UPPER},
    "a mark on what is there": {"marks": b"wd\0", **_UPPER},
    "a mark on nothing": {"marks": b"onone\0", **_UPPER},
    "no marks": _UPPER,
    "marks that are a link": {"marks": (tarfile.SYMTYPE, "/etc/passwd"), **_UPPER},
    "an upper that is a link": {"marks": b"", "upper": (tarfile.SYMTYPE, "../outside")},
    "something else beside it": {"marks": b"", **_UPPER, "layer.json": b"{}"},
    "a device": {"marks": b"", **_UPPER, "upper/d/sda": (tarfile.BLKTYPE, "")},
    "a path that leads out": {"marks": b"", **_UPPER, "upper/../../x": b"x"},
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_an_archive_that_cannot_be_is_refused(host: Host, tmp_path: Path, what: str) -> None:
    path = archive(tmp_path / "content", ARCHIVES[what])
    outside = tmp_path / "outside"
    outside.mkdir()
    with pytest.raises(HvctlError) as refused:
        unpacked.unpack(host, path, tmp_path / "layer", "upper")
    assert "\n" not in refused.value.message
    assert list(outside.iterdir()) == []


@pytest.fixture
def real_folder() -> Iterator[Path]:
    """One where attributes of overlays can be kept."""
    folder = Path(tempfile.mkdtemp(prefix="hvctl-test-", dir="/var/lib"))
    yield folder
    shutil.rmtree(folder)


def test_a_layer_with_all_that_an_overlay_says_comes_back(host: Host, repository: Directory, real_folder: Path) -> None:
    upper = real_folder / "upper"
    (upper / "opaque").mkdir(parents=True)
    layers.make_opaque(upper / "opaque")
    (upper / "opaque" / "file").write_bytes(b"x" * 5000)
    os.link(upper / "opaque" / "file", upper / "twin")
    os.mknod(upper / "gone", stat.S_IFCHR, os.makedev(0, 0))
    os.mknod(upper / "opaque" / ".wh.a\nb", stat.S_IFCHR, os.makedev(0, 0))
    os.mkfifo(upper / "fifo")
    (upper / "link").symlink_to("/etc/passwd")
    (upper / ".wh.real").write_text("a file that is called so")
    os.chown(upper / "link", 0x70000005, 0x70000006, follow_symlinks=False)
    for name in ("", "opaque", "opaque/file", "fifo", ".wh.real"):
        os.chown(upper / name, 0x70000000, 0x70000000)
    os.setxattr(upper / "opaque" / "file", "user.mine", b"value")
    os.setxattr(upper / "opaque" / "file", "user.a=100%3D", b"odd")
    with (upper / "holes").open("wb") as holes:  # to be read for hours, if anybody did
        os.pwrite(holes.fileno(), b"middle", 10**12)
        holes.truncate(8 * 10**12)
    os.chmod(upper / "opaque", 0o2751)
    for path in (upper / "opaque", upper):
        os.utime(path, ns=(10**18 + 5, 10**18 + 7))
    source = Source(kind=transfer.TREE, path=str(upper), name="upper", first_id=0x70000000)
    stored, left_out = repository.store(source, part("layer0"), real_folder / "scratch", ignore, "web")
    again, _count = repository.store(source, part("layer0"), real_folder / "scratch", ignore, "web")
    assert (left_out, again) == (0, stored)  # the same bytes
    repository.load(stored, real_folder / "content", ignore, "web")
    aside = real_folder / "layer"
    get_backend(Mode.CONTAINER).layers.write_layer(
        host, make_image(Mode.CONTAINER), "p", real_folder / "content", aside
    )

    back = aside / "upper"
    assert files.list_tree(back) == files.list_tree(upper)
    for name in ("gone", "opaque/.wh.a\nb"):
        assert layers.is_whiteout(back / name)
    assert layers.is_opaque(back / "opaque") and not layers.is_opaque(back)
    for name in ("opaque", "."):
        facts, was = (back / name).stat(), (upper / name).stat()
        assert (facts.st_mtime_ns, facts.st_mode) == (was.st_mtime_ns, was.st_mode)
    assert (back / "twin").stat().st_ino == (back / "opaque/file").stat().st_ino
    assert os.getxattr(back / "twin", "user.mine") == b"value"
    assert os.getxattr(back / "twin", "user.a=100%3D") == b"odd"
    facts = (back / "holes").stat()
    assert (facts.st_size, facts.st_blocks) == (8 * 10**12, (upper / "holes").stat().st_blocks)
    with (back / "holes").open("rb") as holes:
        assert os.pread(holes.fileno(), 10, 10**12 - 2) == b"\0\0middle\0\0"
    facts = (back / "link").lstat()
    assert (facts.st_uid, facts.st_gid, back.stat().st_uid) == (5, 6, 0)
    assert vars(layers.read_facts(aside)) == {"first_id": 0, "parent": "p"}
    assert sorted(os.listdir(aside)) == ["layer.json", "upper"]
    assert not stat.S_IMODE(aside.stat().st_mode) & 0o077


def test_the_pieces_of_a_file_with_holes_are_counted_up_to_a_limit(
    real_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (real_folder / "upper").mkdir()
    with (real_folder / "upper" / "holes").open("wb") as holes:
        for number in range(3):
            os.pwrite(holes.fileno(), b"x", number * 1024**2)
    assert transfer.count_pieces(os.fsencode(real_folder / "upper" / "holes")) == 3
    monkeypatch.setattr(transfer, "MOST_PIECES", 1)
    assert transfer.count_pieces(os.fsencode(real_folder / "upper" / "holes")) == 2


def test_a_worker_ends_with_whoever_began_it(tmp_path: Path) -> None:
    """Else it would wait for the program behind it, which waits for it, and hold what it was lent: locks."""
    content = tmp_path / "content"
    with content.open("wb") as stream:
        stream.truncate(64 * 1024**2)  # some progress is told
    told, tell = os.pipe()
    os.close(told)
    source = Source(kind=transfer.FILE, path=str(content))
    words = transfer.store_command(source, tmp_path, ["cat"], tmp_path / "stored")
    done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=tell, timeout=60, check=False)
    os.close(tell)
    assert done.returncode != 0


def test_a_source_that_fails_is_no_content(host: Host, repository: Directory, tmp_path: Path) -> None:
    """Another kind of overlay's layer, and a file that is no disk."""
    (tmp_path / "text").write_text("no disk")
    with pytest.raises(HvctlError):
        repository.store(
            Source(kind=transfer.DISK, path=str(tmp_path / "text")), part("layer0"), tmp_path / "s", ignore, "web"
        )
    with pytest.raises(HvctlError):
        repository.store(
            Source(kind=transfer.TREE, path=str(tmp_path / "none"), name="upper"),
            part("x"),
            tmp_path / "s",
            ignore,
            "web",
        )
    assert os.listdir(repository.path / "partial") == os.listdir(repository.path / "blobs") == []


def test_marks_list_what_an_archive_cannot_hold(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    listing = marks.Listing(tmp_path)
    assert (listing.paths, listing.marks, listing.left_out) == ([b".", b"a", b"a/b"], b"", 0)
    deep = tmp_path
    for _level in range(405):
        deep = deep / "d"
    subprocess.run(["mkdir", "-p", str(deep)], check=True)
    with pytest.raises(OSError, match="deeper"):
        marks.Listing(tmp_path)


@pytest.mark.parametrize(
    "how", ["another", "longer", "shorter", "cut short", "no zstd", "gone", "a link", "a FIFO", "empty"]
)
def test_content_that_is_not_what_was_stored_is_refused(
    host: Host, repository: Directory, tmp_path: Path, how: str
) -> None:
    (tmp_path / "content").write_bytes(b"content" * 10_000)
    source = Source(kind=transfer.FILE, path=str(tmp_path / "content"))
    stored, _count = repository.store(source, part("layer0"), tmp_path / "scratch", ignore, "web")
    blob = repository.path / "blobs" / stored.sha256[:2] / f"{stored.sha256}.zst"
    content = {"another": b"CONTENT" * 10_000, "longer": b"content" * 10_001, "shorter": b"content" * 9_999}.get(how)
    if content is not None:
        packed = subprocess.run(["zstd", "-qc"], input=content, capture_output=True, check=True, timeout=30)
        blob.write_bytes(packed.stdout)
    elif how in ("cut short", "no zstd", "empty"):
        blob.write_bytes({"cut short": blob.read_bytes()[:-3], "no zstd": b"content" * 10_000}.get(how, b""))
    else:
        blob.unlink()
    if how == "a link":
        blob.symlink_to("/etc/passwd")
    if how == "a FIFO":
        os.mkfifo(blob)
    for target in (None, tmp_path / "back"):
        with pytest.raises(InvalidSpec, match="layer0") as refused:
            repository.load(stored, target, ignore, "web")
        assert "\n" not in refused.value.message
    again, _count = repository.store(source, part("layer0"), tmp_path / "scratch", ignore, "web")
    repository.load(again, None, ignore, "web")  # storing it once more has mended it


def test_a_base_that_is_not_as_it_says_is_refused(host: Host, tmp_path: Path) -> None:
    disk = qcow2(tmp_path / "disk.qcow2")
    subprocess.run(["qemu-img", "resize", "-q", str(disk), "2M"], check=True)
    work = Building(host=host, name="x", directory=tmp_path, events=ignore)
    with pytest.raises(InvalidSpec, match="not as it says"):
        get_backend(Mode.VM).layers.write_base(work, make_image(Mode.VM), {"disk.qcow2": disk})
