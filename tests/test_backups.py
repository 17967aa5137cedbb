"""Backups of instances that are off, to a directory and to restic: what comes back, what is refused. Both modes."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import hvctl
from hvctl import gc, images, operation
from hvctl.backups import create as creation
from hvctl.backups import delete as deletion
from hvctl.backups import restore as restoring
from hvctl.backups import verify as verification
from hvctl.backups.create import Wanted
from hvctl.backups.directory import Directory
from hvctl.backups.manifest import Backup
from hvctl.backups.opening import open_repository
from hvctl.backups.repository import Repository
from hvctl.config import Config
from hvctl.errors import AlreadyExists, HostError, HvctlError, InvalidSpec, NotFound, Unsupported, UsageError
from hvctl.events import Event, Sink, StepStarted
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.instances import change, compact, copies, create, disks, effects, lifecycle, query, snapshots
from hvctl.instances.snapshots import Take
from hvctl.instances.verbs import TAKE
from hvctl.model import Mode, Record, VolumeFormat
from hvctl.units import MIB
from tests import stacks, tiny, victims, world
from tests.cli import run

pytestmark = [pytest.mark.guest, pytest.mark.apart]


@pytest.fixture
def name(host: Host, tiny_image: str) -> Iterator[str]:
    with world.visiting(host, "backup", collects=True) as free:
        yield free


@pytest.fixture
def password(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text("not a secret\n")
    return path


@pytest.fixture(params=["directory", "restic"])
def repository(host: Host, tmp_path: Path, password: Path, request: pytest.FixtureRequest) -> Repository:
    """An empty one of each kind."""
    if request.param == "directory":
        made = open_repository(host, str(tmp_path / "repository"))
    else:
        made = open_repository(host, f"restic:{tmp_path / 'restic'}", password_file=str(password))
    assert made.make()
    return made


def make(host: Host, mode: Mode, name: str) -> Record:
    create.create(host, create.Request(spec=tiny.make_spec(name, mode), start=False))
    return query.get(host, name).record


def write(host: Host, name: str, slot: int, value: int) -> None:
    stacks.write(host, query.get(host, name).record, slot, value)


def content_of(host: Host, name: str) -> stacks.Content:
    record = query.get(host, name).record
    return stacks.read(host, record, record.layers)


def back_up(host: Host, repository: Repository, name: str, **options: object) -> Backup:
    return creation.create(host, repository, Wanted(name=name, **options))  # type: ignore[arg-type]


def restore(host: Host, repository: Repository, backup: str, name: str = "") -> Record:
    request = restoring.Request(backup=backup, name=name, start=False)
    return restoring.restore(host, repository, request).record


@pytest.mark.long_in(Mode.VM, repository="restic")  # that restic keeps files as well is in test_backups_restic.py
def test_a_backup_comes_back_under_another_name_in_an_empty_store(
    host: Host, elsewhere: Host, repository: Repository, mode: Mode, name: str
) -> None:
    source = make(host, mode, name)
    write(host, name, 0, 1)
    snapshots.take(host, name, Take(name="one"))
    write(host, name, 1, 2)
    if mode is Mode.CONTAINER:
        stacks.write(host, query.get(host, name).record, 0, 0)  # a whiteout
    wanted = content_of(host, name)
    first = back_up(host, repository, name)
    assert content_of(host, name) == wanted
    assert [item.name for item in query.get(host, name).record.snapshots] == ["one"]
    write(host, name, 2, 3)
    second = back_up(host, repository, name, comment="later")
    assert {part.key for part in first.layers} < {part.key for part in second.layers}
    assert len(second.layers) == len(first.layers) + 1
    assert second.base_parts == first.base_parts  # stored once
    assert second.stored_bytes < first.stored_bytes

    repository.host = elsewhere
    made = restore(elsewhere, repository, f"{name}@{first.id}", f"{name}-x")
    assert content_of(elsewhere, f"{name}-x") == wanted
    assert content_of(elsewhere, f"{name}-x") != content_of(host, name)
    for field in ("uuid", "mac", "host_key"):
        assert getattr(made, field) != getattr(source, field)
    stacks.write(elsewhere, made, 3, 4)
    snapshots.take(elsewhere, f"{name}-x", Take(name="there"))
    stacks.write(elsewhere, query.get(elsewhere, f"{name}-x").record, 4, 5)
    copies.copy(elsewhere, copies.Request(source=f"{name}-x", name=f"{name}-z", is_full=True, start=False))
    snapshots.revert(elsewhere, f"{name}-x", "there")
    snapshots.delete(elsewhere, f"{name}-x", "there")
    compact.compact(elsewhere, f"{name}-x", depth=2)
    assert content_of(elsewhere, f"{name}-x") == (*wanted[:3], 4, *wanted[4:])
    assert content_of(elsewhere, f"{name}-z") == (*wanted[:3], 4, 5, *wanted[5:])
    lifecycle.delete(elsewhere, f"{name}-z")
    again = restore(elsewhere, repository, name, f"{name}-y")  # the latest; its image is there by now
    assert content_of(elsewhere, f"{name}-y") == content_of(host, name)
    assert again.image_id == made.image_id
    lifecycle.delete(elsewhere, f"{name}-x")
    lifecycle.delete(elsewhere, f"{name}-y")
    images.prune(elsewhere)
    assert os.listdir(elsewhere.store.images) == os.listdir(elsewhere.store.layers) == []


@pytest.fixture
def directory(host: Host, tmp_path: Path) -> Directory:
    """An empty repository that is a directory."""
    made = open_repository(host, str(tmp_path / "repository"))
    assert isinstance(made, Directory)
    made.make()
    return made


def test_under_its_own_name_it_is_the_same_again(host: Host, directory: Directory, mode: Mode, name: str) -> None:
    make(host, mode, name)
    assert run_set(host, name) == 0
    write(host, name, 0, 7)
    source = query.get(host, name).record
    back_up(host, directory, name)
    with pytest.raises(AlreadyExists):
        restore(host, directory, name)
    key = (host.store.identity(source.uuid) / "hvctl.host_key").read_bytes()
    lifecycle.delete(host, name)

    made = restore(host, directory, name)
    for field in ("uuid", "mac", "address", "host_key", "created_at", "keep", "image_id", "spec", "kernel_release"):
        assert getattr(made, field) == getattr(source, field), field
    assert (host.store.identity(made.uuid) / "hvctl.host_key").read_bytes() == key
    assert content_of(host, name)[0] == 7
    twin = restore(host, directory, name, f"{name}-twin")
    assert twin.keep == () and not {twin.uuid, twin.mac, twin.host_key} & {made.uuid, made.mac, made.host_key}
    assert content_of(host, f"{name}-twin")[0] == 7
    assert not twin.spec.autostart


def run_set(host: Host, name: str) -> int:
    return run(host.config, "set", name, "--keep", "daily=3", "--autostart").status


def test_one_whose_identity_lives_on_gets_another(host: Host, directory: Directory, mode: Mode, name: str) -> None:
    make(host, mode, name)
    back_up(host, directory, name)
    assert run(host.config, "rename", name, f"{name}-old").status == 0
    made, old = restore(host, directory, name), query.get(host, f"{name}-old").record
    assert made.name == name
    assert not {made.uuid, made.mac, made.host_key, made.address} & {old.uuid, old.mac, old.host_key, old.address}


@pytest.mark.only_mode(Mode.VM, "a container has no firmware, kernel or seed of its own")
def test_what_a_vm_has_beside_its_root_comes_back(host: Host, directory: Directory, mode: Mode, name: str) -> None:
    request = create.Request(spec=tiny.make_spec(name, mode), user_data=b"#cloud-config\n{}\n", start=False)
    source = create.create(host, request).record
    source = replace(source, kernel_release="9.9-other")  # as `hvctl kernel` does
    operation.write_record(host, effects.get_domain(host, source), source)
    store, uuid = host.store, source.uuid
    for path, content in (
        (store.kernel(uuid), b"kernel"),
        (store.initrd(uuid), b"initrd"),
        (store.nvram(uuid), b"nvram"),
    ):
        files.remove(path)
        path.write_bytes(content)
    seed = store.seed(uuid).read_bytes()
    back_up(host, directory, name)
    lifecycle.delete(host, name)
    made = restore(host, directory, name)
    assert made.kernel_release == "9.9-other"
    found = [
        path.read_bytes() for path in (store.kernel(uuid), store.initrd(uuid), store.nvram(uuid), store.seed(uuid))
    ]
    assert found == [b"kernel", b"initrd", b"nvram", seed]
    assert stat.S_IMODE(store.seed(uuid).stat().st_mode) == stat.S_IMODE(store.nvram(uuid).stat().st_mode) == 0o600
    twin = restore(host, directory, name, f"{name}-twin")
    assert (store.kernel(twin.uuid).read_bytes(), store.nvram(twin.uuid).read_bytes()) == (b"kernel", b"nvram")


def test_what_the_host_would_have_to_give_must_be_said(
    host: Host, directory: Directory, mode: Mode, name: str, tmp_path: Path
) -> None:
    template = tmp_path / "mine.xml"
    shutil.copy(Path(hvctl.__file__).parents[1] / "domain_templates" / mode / "default.xml", template)
    spec = replace(tiny.make_spec(name, mode), template=str(template))
    create.create(host, create.Request(spec=spec, start=False))
    made = back_up(host, directory, name)
    assert f"template --template {template}" in made.left_out
    with pytest.raises(UsageError, match="template"):
        restore(host, directory, name, f"{name}-x")
    request = restoring.Request(backup=name, name=f"{name}-x", template="default", memory_bytes=256 * MIB, start=False)
    assert restoring.restore(host, directory, request).record.spec.memory_bytes == 256 * MIB


def test_ctrl_c_leaves_nothing(host: Host, directory: Directory, mode: Mode, name: str) -> None:
    make(host, mode, name)
    write(host, name, 0, 1)

    def interrupt(event: Event) -> None:
        if isinstance(event, StepStarted) and (event.verb, event.step) == (creation.VERB, "manifest"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        creation.create(host, directory, Wanted(name=name), interrupt)
    assert directory.list_entries() == [] and blobs(directory) == [] and is_clean(directory)
    assert query.get(host, name).record.snapshots == ()
    assert gc.collect(host) == ()


def test_a_restore_looks_for_space_first(host: Host, directory: Directory, mode: Mode, name: str) -> None:
    make(host, mode, name)
    write(host, name, 0, 1)
    made = back_up(host, directory, name)
    path = directory.path / "backups" / name / f"{made.id}.json"
    data = json.loads(path.read_text())
    data["layers"][0]["used_bytes"] = 2**49
    path.write_text(json.dumps(data))
    before = world.look(host)
    with pytest.raises(HostError, match="takes 1024TiB"):
        restore(host, directory, name, f"{name}-x")
    assert world.differences(before, world.look(host)) == []


def test_a_stack_that_backups_make_deep_is_merged(
    host: Host, directory: Directory, mode: Mode, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(host, mode, name)
    for number in range(3):
        write(host, name, number, number + 1)
        back_up(host, directory, name)
    wanted = content_of(host, name)
    assert len(query.get(host, name).record.layers) == 4
    monkeypatch.setattr(compact.compact, "__kwdefaults__", {**compact.compact.__kwdefaults__, "depth": 4})
    write(host, name, 5, 6)
    made = back_up(host, directory, name)
    assert len(query.get(host, name).record.layers) == 2
    merged = back_up(host, directory, name)
    assert len(made.layers) == 4 and len(merged.layers) == 1
    assert content_of(host, name) == (*wanted[:5], 6, *wanted[6:])
    for number, backup in enumerate((made, merged)):
        restore(host, directory, f"{name}@{backup.id}", f"{name}-x{number}")
        assert content_of(host, f"{name}-x{number}") == content_of(host, name)
    assert gc.collect(host) == ()


def while_storing(host: Host, directory: Directory, name: str, deed: Callable[[], object]) -> Backup:
    """Back it up, and do something to it when the first content is about to be stored."""
    left = [deed]

    def interfere(event: Event) -> None:
        if isinstance(event, StepStarted) and (event.verb, event.step) == (creation.VERB, "content") and left:
            left.pop()()

    return creation.create(host, directory, Wanted(name=name), interfere)


def test_what_is_done_to_it_meanwhile_does_no_harm(host: Host, directory: Directory, mode: Mode, name: str) -> None:
    make(host, mode, name)
    for number in range(3):
        write(host, name, number, number + 1)
        snapshots.take(host, name, Take(name=f"s{number}"))
    for number in range(3):
        snapshots.delete(host, name, f"s{number}")
    wanted = content_of(host, name)

    def tidy() -> None:
        """What reads nothing of a backup leaves it alone: no snapshot is collected, no layer merged."""
        write(host, name, 6, 6)
        assert gc.collect(host) == ()
        assert compact.compact(host, name, depth=2) == 0

    made = while_storing(host, directory, name, tidy)
    assert compact.compact(host, name, depth=2) > 0
    change.rename(host, name, f"{name}-old")
    renamed = while_storing(host, directory, f"{name}-old", lambda: change.rename(host, f"{name}-old", f"{name}-new"))
    assert query.get(host, f"{name}-new").record.snapshots == ()
    write(host, f"{name}-new", 7, 7)
    with pytest.raises(HvctlError):
        while_storing(host, directory, f"{name}-new", lambda: lifecycle.delete(host, f"{name}-new"))
    assert is_clean(directory) and [entry.id for entry in directory.list_entries()] == [made.id, renamed.id]
    assert all(not item.problems for item in verification.verify(directory))
    assert gc.collect(host) == () and gc.list_orphans(host) == []
    restore(host, directory, name)
    assert content_of(host, name) == wanted
    assert content_of(host, restore(host, directory, f"{name}-old").name)[6] == 6


def blobs(directory: Directory) -> list[Path]:
    return sorted((directory.path / "blobs").glob("*/*"), key=lambda path: path.stat().st_size)


def test_what_is_damaged_is_found_and_not_restored(host: Host, directory: Directory, mode: Mode, name: str) -> None:
    """Here content that is another; what else can be wrong with it is in test_backups_hostile.py."""
    make(host, mode, name)
    write(host, name, 0, 9)
    made = back_up(host, directory, name)
    part = made.layers[0]
    blob = directory.path / "blobs" / part.sha256[:2] / f"{part.sha256}.zst"
    packed = subprocess.run(["zstd", "-qc"], input=b"x" * part.size_bytes, capture_output=True, check=True, timeout=30)
    blob.write_bytes(packed.stdout)
    before = world.look(host)
    with pytest.raises(InvalidSpec, match="layer0") as refused:
        restore(host, directory, name, f"{name}-x")
    assert "\n" not in refused.value.message
    assert world.differences(before, world.look(host)) == []
    found = verification.verify(directory)
    assert len(found) == 1 and len(found[0].problems) == 1 and "layer0" in found[0].problems[0]

    mended = back_up(host, directory, name, is_full=True)  # it reads everything again
    assert [item.sha256 for item in mended.layers] == [item.sha256 for item in made.layers]
    assert all(not item.problems for item in verification.verify(directory))


def test_deleting_one_leaves_what_another_needs(host: Host, directory: Directory, mode: Mode, name: str) -> None:
    make(host, mode, name)
    write(host, name, 0, 1)
    first = back_up(host, directory, name)
    write(host, name, 1, 2)
    second = back_up(host, directory, name)
    copies.copy(host, copies.Request(source=name, name=f"{name}-copy", start=False))
    other = back_up(host, directory, f"{name}-copy")
    assert other.base_parts == first.base_parts
    deletion.delete(directory, deletion.choose(directory, [f"{name}@{first.id}"]))
    assert [entry.id for entry in directory.list_entries(name)] == [second.id]
    assert all(not item.problems for item in verification.verify(directory))
    assert len(blobs(directory)) == len({part.sha256 for item in (second, other) for part in item.parts})
    left = deletion.choose(directory, [name], (("daily", 1),))
    assert left == []
    deletion.delete(directory, deletion.choose(directory, [name, f"{name}-copy"]))
    assert blobs(directory) == []


def test_what_cannot_be_is_refused_and_changes_nothing(
    host: Host, directory: Directory, mode: Mode, name: str, tmp_path: Path
) -> None:
    make(host, mode, name)
    back_up(host, directory, name, with_image=False)
    before, stored = world.look(host), sorted(directory.path.rglob("*"))
    repo = ("--repo", str(directory.path))
    for status, words in {
        3: ("create", f"{name}-x", *repo),
        4: ("restore", name, *repo, "--no-start"),
        2: ("create", name),
    }.items():
        done = run(host.config, "backup", *words)
        assert (done.status, done.err.count("\n"), done.out) == (status, 1, ""), done.err
    for words in (("list", "--repo", str(tmp_path / "none")), ("create", name, "--repo", str(tmp_path)),
                  ("restore", f"{name}@2000", *repo), ("verify", "nobody", *repo)):  # fmt: skip
        assert run(host.config, "backup", *words).status == 3
    assert run(host.config, "backup", "restore", name, "A b", *repo).status == 7
    assert run(host.config, "backup", "delete", name, *repo, "--yes").status == 2
    assert world.differences(before, world.look(host)) == []
    assert sorted(directory.path.rglob("*")) == stored


def test_without_its_image_it_needs_a_host_that_has_it(
    host: Host, elsewhere: Host, directory: Directory, mode: Mode, name: str
) -> None:
    make(host, mode, name)
    back_up(host, directory, name, with_image=False)
    directory.host = elsewhere
    with pytest.raises(NotFound, match="without its image"):
        restore(elsewhere, directory, name, f"{name}-x")
    directory.host = host
    restore(host, directory, name, f"{name}-x")


def test_cron_sees_nothing_but_failures(host: Host, directory: Directory, mode: Mode, name: str) -> None:
    make(host, mode, name)
    repo = ("--repo", str(directory.path))
    done = run(host.config, "backup", "create", name, *repo)
    assert (done.status, done.out, done.err) == (0, "", "")
    done = run(host.config, "backup", "create", "nobody", name, "nothing", *repo)
    assert (done.status, done.out, done.err.count("\n")) == (3, "", 2)
    listed = json.loads(run(host.config, "backup", "list", name, *repo, "--json").out)
    assert [(item["name"], item["consistency"]) for item in listed] == [(name, "stopped")] * 2
    assert run(host.config, "backup", "verify", *repo).status == 0
    (directory.path / "backups" / name / f"{listed[0]['id']}.json").write_text("{}")
    done = run(host.config, "backup", "verify", *repo)
    assert (done.status, "1 of 2 backups are damaged" in done.err) == (7, True)
    assert "damaged" in run(host.config, "backup", "list", *repo).out
    assert run(host.config, "backup", "delete", name, "--keep", "hourly=1", *repo).status == 0
    assert run(host.config, "backup", "delete", f"{name}@{listed[0]['id']}", "--yes", *repo).status == 0


STEPS = [(TAKE.name, "fill"), *((creation.VERB, step) for step in ("collect", "content", "manifest", "release"))]


def _create(path: str, host: Host, name: str, events: Sink) -> object:
    return creation.create(host, open_repository(host, path), Wanted(name=name), events)


def _die_while_storing(path: str, host: Host, name: str) -> None:
    """Between the content of a layer and what comes after it."""
    repository = open_repository(host, path)
    repository.keep = lambda token, moved: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,func-returns-value,return-value]
    creation.create(host, repository, Wanted(name=name))


def is_clean(directory: Directory) -> bool:
    """Whether it holds what its backups consist of, and nothing else."""
    backups = [entry.backup for entry in directory.list_entries() if entry.backup]
    wanted = {f"{part.sha256}.zst" for backup in backups for part in backup.parts}
    names = {path.name for path in blobs(directory)}
    return names == wanted and not os.listdir(directory.path / "partial") and not (directory.path / "lock").exists()


@pytest.mark.parametrize(("verb", "step"), STEPS)
def test_a_killed_backup_is_none_and_the_next_one_clears_up(
    host: Host, settings: Config, directory: Directory, mode: Mode, name: str, verb: str, step: str
) -> None:
    make(host, mode, name)
    write(host, name, 0, 1)
    back_up(host, directory, name)
    write(host, name, 1, 2)
    before = content_of(host, name)
    victims.die_at(settings, functools.partial(_create, str(directory.path)), verb, step, name)
    listed = directory.list_entries()
    assert all(entry.backup for entry in listed) and len(listed) == (2 if step == "release" else 1)
    assert all(not item.problems for item in verification.verify(directory))
    if step == "content":  # not settled by `gc` first: the next backup does that, too
        gc.collect(host)
        assert gc.collect(host) == ()
        assert query.get(host, name).record.snapshots == ()
    back_up(host, directory, name)
    assert query.get(host, name).record.snapshots == ()
    assert content_of(host, name) == before
    assert is_clean(directory)
    if step == "manifest":
        restore(host, directory, name, f"{name}-x")
        assert content_of(host, f"{name}-x") == before


def test_what_a_backup_was_killed_in_storing_goes_with_the_next_change(
    host: Host, settings: Config, directory: Directory, mode: Mode, name: str
) -> None:
    make(host, mode, name)
    first = back_up(host, directory, name)
    write(host, name, 1, 2)
    victims.die_in(settings, functools.partial(_die_while_storing, str(directory.path)), name)
    assert os.listdir(directory.path / "partial")
    deletion.delete(directory, deletion.choose(directory, [f"{name}@{first.id}"]))
    assert is_clean(directory) and blobs(directory) == []
    gc.collect(host)


def _delete(path: str, host: Host, name: str) -> None:
    repository = open_repository(host, path)
    repository.collect = lambda used: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,func-returns-value,return-value]
    deletion.delete(repository, deletion.choose(repository, [name]))


def test_a_killed_deletion_leaves_the_other_whole(
    host: Host, settings: Config, directory: Directory, mode: Mode, name: str
) -> None:
    make(host, mode, name)
    back_up(host, directory, name)
    write(host, name, 0, 3)
    kept = back_up(host, directory, name)
    first = directory.list_entries()[0]
    victims.die_in(settings, functools.partial(_delete, str(directory.path)), f"{name}@{first.id}")
    assert [entry.id for entry in directory.list_entries()] == [kept.id]
    assert all(not item.problems for item in verification.verify(directory))
    back_up(host, directory, name)
    assert is_clean(directory)


def test_a_full_disk_is_seen_before_and_while_storing(host: Host, mode: Mode, name: str, tmp_path: Path) -> None:
    """A repository on a file system of a few megabytes."""
    make(host, mode, name)
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(small)], check=True, timeout=30)
    try:
        directory = open_repository(host, str(small / "repository"))
        assert isinstance(directory, Directory)
        directory.make()
        (small / "filler").write_bytes(bytes(10 * MIB))
        before = world.look(host)
        with pytest.raises(HostError, match="not enough space"):
            back_up(host, directory, name)
        facts = os.statvfs(small)
        (small / "more").write_bytes(bytes((facts.f_bavail - 3) * facts.f_frsize))
        directory.find_free_bytes = lambda: None  # type: ignore[method-assign]  # as if somebody else filled it meanwhile
        with pytest.raises(HostError) as refused:
            back_up(host, directory, name)
        assert "\n" not in refused.value.message
        assert is_clean(directory) and directory.list_entries() == []
        assert world.differences(before, world.look(host)) == []
    finally:
        subprocess.run(["umount", str(small)], check=True, timeout=30)


def test_its_volumes_come_along(host: Host, elsewhere: Host, directory: Directory, mode: Mode, name: str) -> None:
    make(host, mode, name)
    disks.add(host, name, disks.DiskRequest(name="files", size_bytes=16 * MIB, filesystem="ext4"))
    if mode is Mode.VM:
        disks.add(host, name, disks.DiskRequest(name="more", size_bytes=1 * MIB, format=VolumeFormat.QCOW2))
    else:
        disks.add(host, name, disks.DiskRequest(name="more", target="/srv/elsewhere"))
    source = query.get(host, name).record
    paths = {disk.name: host.store.volume_content(disk.volume, disk.format) for disk in source.disks}
    if mode is Mode.VM:
        words = ["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", str(paths["more"])]
        subprocess.run(words, check=True, capture_output=True, timeout=60)
    else:
        (paths["more"] / "file").write_text("seven")
        os.chown(paths["more"] / "file", 5, 6)
    with paths["files"].open("r+b") as stream:
        stream.seek(10 * MIB)
        stream.write(b"mine")
    assert back_up(host, directory, name).left_out == ()
    assert "volume files" in back_up(host, directory, name, with_volumes=False).left_out

    directory.host = elsewhere
    first = f"{name}@{directory.list_entries()[0].id}"
    request = restoring.Request(backup=first, name=f"{name}-x", start=False)
    if mode is Mode.CONTAINER:  # a file system that this host's kernel would mount
        before = world.look(elsewhere)
        with pytest.raises(Unsupported, match="come"):
            restoring.restore(elsewhere, directory, request)
        assert world.differences(before, world.look(elsewhere)) == []
    made = restoring.restore(elsewhere, directory, replace(request, is_trusted=True)).record
    assert [(disk.name, disk.format, disk.target, disk.serial, disk.size_bytes) for disk in made.disks] == [
        (disk.name, disk.format, disk.target, disk.serial, disk.size_bytes) for disk in source.disks
    ]
    found = {disk.name: elsewhere.store.volume_content(disk.volume, disk.format) for disk in made.disks}
    assert found["files"].read_bytes() == paths["files"].read_bytes()
    assert found["files"].stat().st_blocks * 512 < 8 * MIB  # holes are holes
    if mode is Mode.VM:
        assert stacks.read_disk(found["more"])[0] == 7
    else:
        facts = (found["more"] / "file").stat()
        assert ((found["more"] / "file").read_text(), facts.st_uid, facts.st_gid) == ("seven", 5, 6)
    xml = query.get_xml(elsewhere, query.get(elsewhere, f"{name}-x"))
    assert all(disk.volume in xml for disk in made.disks)
    lifecycle.delete(elsewhere, f"{name}-x")
    assert os.listdir(elsewhere.store.volumes) == []
