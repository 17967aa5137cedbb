"""Snapshots and copies of instances that are off: against a pure model, and what is refused. Both modes."""

from __future__ import annotations

import datetime
import functools
import json
import os
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from hvctl import gc, images, operation
from hvctl.config import Config
from hvctl.errors import AlreadyExists, HostError, InvalidSpec, NotFound, Unsupported, UsageError, WrongState
from hvctl.events import Event, Progress
from hvctl.host import Host
from hvctl.instances import compact, copies, create, effects, layers, lifecycle, publish, query, schedule, snapshots
from hvctl.instances.snapshots import Take
from hvctl.model import Mode, Record
from hvctl.units import MIB
from tests import campaign, layereddisk, stacks, tiny, world
from tests.cli import Ran, call, run

pytestmark = [pytest.mark.guest, pytest.mark.apart]


def make(host: Host, mode: Mode, name: str) -> Record:
    create.create(host, create.Request(spec=tiny.make_spec(name, mode), start=False))
    return query.get(host, name).record


@pytest.fixture
def name(host: Host, tiny_image: str) -> Iterator[str]:
    with world.visiting(host, "snap") as free:
        yield free


def content_of(host: Host, name: str, snapshot: str = "") -> stacks.Content:
    record = query.get(host, name).record
    if not snapshot:
        return stacks.read(host, record, record.layers)
    layer = snapshots.get_snapshot(record, snapshot).layer
    return stacks.read(host, record, layers.stack_of(host, layer))


def write(host: Host, name: str, slot: int, value: int) -> None:
    stacks.write(host, query.get(host, name).record, slot, value)


def test_a_revert_brings_back_what_was_and_keeps_later_snapshots(host: Host, mode: Mode, name: str) -> None:
    make(host, mode, name)
    write(host, name, 0, 1)
    snapshots.take(host, name, Take(name="one", comment="first"))
    write(host, name, 0, 2)
    write(host, name, 1, 7)
    snapshots.take(host, name, Take(name="two"))
    write(host, name, 0, 0)
    two = content_of(host, name, "two")
    assert (two[0], two[1], content_of(host, name)[0]) == (2, 7, 0)

    assert snapshots.revert(host, name, "one") is False
    assert content_of(host, name) == content_of(host, name, "one") == (1, *stacks.EMPTY[1:])
    assert content_of(host, name, "two") == two
    listed = snapshots.list_snapshots(query.get(host, name).record)
    assert [(item.name, item.comment) for item in listed] == [("one", "first"), ("two", "")]
    for layer in listed[0].layer, listed[1].layer:  # what a guest wrote is nobody else's to read
        path = host.store.layer(layer)
        assert not path.stat().st_mode & 0o044
        assert mode is Mode.CONTAINER or not host.store.layer_disk(layer).stat().st_mode & 0o337


def test_who_deletes_one_is_asked_about_its_snapshots(
    host: Host, settings: Config, mode: Mode, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(host, mode, name)
    asked: list[str] = []
    monkeypatch.setattr("hvctl.cli.lifecycle.confirm", lambda _app, question, **_options: asked.append(question))
    snapshots.take(host, name, Take(name="one"))
    assert call(settings, "delete", name).status == 0
    assert asked == [f"Delete {name} (stopped) with all data and 1 snapshot?"]


def test_sizes_and_definition_come_back_and_the_name_stays(host: Host, settings: Config, mode: Mode, name: str) -> None:
    before = make(host, mode, name)
    snapshots.take(host, name, Take(name="one"))
    assert run(settings, "set", name, "--cpus", "2", "--memory", "256MiB").status == 0
    assert run(settings, "rename", name, f"{name}-new").status == 0
    snapshots.revert(host, f"{name}-new", "one")
    after = query.get(host, f"{name}-new")
    assert (after.live.cpus, after.record.spec.cpus) == (1, 1)
    assert after.record.spec.memory_bytes == before.spec.memory_bytes
    assert (after.record.uuid, after.record.address, after.record.mac) == (before.uuid, before.address, before.mac)


def test_snapshots_go_in_any_order_and_layers_with_the_last_who_stands_on_them(
    host: Host, mode: Mode, name: str
) -> None:
    make(host, mode, name)
    for number in range(1, 5):
        write(host, name, number, number)
        snapshots.take(host, name, Take(name=f"s{number}"))
    contents = {f"s{number}": content_of(host, name, f"s{number}") for number in range(1, 5)}
    snapshots.revert(host, name, "s2")
    for gone in ("s1", "s4", "s2", "s3"):
        snapshots.delete(host, name, gone)
        del contents[gone]
        assert {other: content_of(host, name, other) for other in contents} == contents
        assert content_of(host, name)[:4] == (0, 1, 2, 0)
    record = query.get(host, name).record
    assert (record.snapshots, record.current) == ((), "")
    assert len(record.layers) == len(os.listdir(host.store.layers)) == 3  # s3 and s4 went with their names
    assert gc.collect(host) == ()


def test_an_untouched_top_gets_a_name_and_no_layer(host: Host, mode: Mode, name: str) -> None:
    before = make(host, mode, name)
    for number in range(3):
        snapshots.take(host, name, Take(name=f"s{number}"))
    assert query.get(host, name).record.layers == before.layers
    write(host, name, 0, 5)
    snapshots.revert(host, name, "s1")
    assert content_of(host, name) == stacks.EMPTY


def test_what_cannot_be_is_refused_and_changes_nothing(host: Host, settings: Config, mode: Mode, name: str) -> None:
    make(host, mode, name)
    write(host, name, 0, 1)
    snapshots.take(host, name, Take(name="one"))
    before = world.look(host)
    for error, deed in (
        (NotFound, lambda: snapshots.revert(host, name, "other")),
        (NotFound, lambda: snapshots.delete(host, name, "other")),
        (NotFound, lambda: snapshots.take(host, f"{name}-x", Take())),
        (AlreadyExists, lambda: snapshots.take(host, name, Take(name="one"))),
        (InvalidSpec, lambda: snapshots.take(host, name, Take(name="../x"))),
        (InvalidSpec, lambda: snapshots.take(host, name, Take(name="auto-x"))),
        (InvalidSpec, lambda: snapshots.take(host, name, Take(name="x", comment="a\nb"))),
        (
            {Mode.VM: WrongState, Mode.CONTAINER: Unsupported}[mode],
            lambda: snapshots.take(host, name, Take(with_memory=True)),
        ),
    ):
        with pytest.raises(error) as refused:
            deed()
        assert "\n" not in refused.value.message
    assert world.differences(before, world.look(host)) == []
    done = run(settings, "snapshot", "revert", name, "other", "--yes")
    assert (done.status, done.err.count("\n")) == (3, 1), done.err


def test_a_copy_is_another_machine_and_outlives_its_source(host: Host, mode: Mode, name: str) -> None:
    source = make(host, mode, name)
    write(host, name, 0, 1)
    snapshots.take(host, name, Take(name="one"))
    write(host, name, 0, 2)
    for number, request in enumerate(
        (
            copies.Request(source=name, name=f"{name}-0", start=False),
            copies.Request(source=name, name=f"{name}-1", snapshot="one", start=False),
            copies.Request(source=name, name=f"{name}-2", is_full=True, start=False),
            copies.Request(source=f"{name}-1", name=f"{name}-3", start=False),
        )
    ):
        copies.copy(host, request)
        assert content_of(host, f"{name}-{number}")[0] == (2, 1, 2, 1)[number]
    records = [source, *(query.get(host, f"{name}-{number}").record for number in range(4))]
    for field_name in ("uuid", "mac", "address", "host_key"):
        assert len({getattr(record, field_name) for record in records}) == 5
    assert set(records[1].layers) & set(query.get(host, name).record.layers)
    assert not set(records[3].layers) & set(query.get(host, name).record.layers)
    assert all(record.snapshots == () for record in records[1:])
    xml = query.get_xml(host, query.get(host, f"{name}-3"))
    for foreign in (source.uuid, source.mac, source.device, records[2].uuid, records[2].mac):
        assert str(foreign) not in xml

    lifecycle.delete(host, name)
    lifecycle.delete(host, f"{name}-1")
    assert [content_of(host, f"{name}-{number}")[0] for number in (0, 2, 3)] == [2, 2, 1]
    assert gc.collect(host) == ()


def test_what_is_no_copy_is_refused(host: Host, mode: Mode, name: str) -> None:
    make(host, mode, name)
    make(host, mode, f"{name}-x")
    before = world.look(host)
    for error, options in (
        (NotFound, {"source": f"{name}-y", "name": f"{name}-z"}),
        (NotFound, {"source": name, "name": f"{name}-z", "snapshot": "none"}),
        (AlreadyExists, {"source": name, "name": f"{name}-x"}),
        (UsageError, {"source": name, "name": name}),
        (InvalidSpec, {"source": name, "name": "A b"}),
    ):
        with pytest.raises(error):
            copies.copy(host, copies.Request(start=False, **options))  # type: ignore[arg-type]
    assert world.differences(before, world.look(host)) == []


def deepen(host: Host, name: str, count: int, *, offset_bytes: int = 0) -> None:
    """One snapshot on another, each with something written."""
    for number in range(count):
        record = query.get(host, name).record
        stacks.write(host, record, number % stacks.SLOTS, number % 255 + 1, offset_bytes=offset_bytes)
        snapshots.take(host, name, Take(name=f"s{number}"))


def test_a_stack_is_compacted_and_shows_the_same_to_all_who_stand_on_it(host: Host, mode: Mode, name: str) -> None:
    make(host, mode, name)
    write(host, name, 7, 9)
    deepen(host, name, layers.COMPACT_FROM + 2)
    copies.copy(host, copies.Request(source=name, name=f"{name}-a", snapshot="s20", start=False))
    for number in range(layers.COMPACT_FROM + 2):
        if number % 10:
            snapshots.delete(host, name, f"s{number}")
    kept = [item.name for item in snapshots.list_snapshots(query.get(host, name).record)]
    assert kept == ["s0", "s10", "s20", "s30"]
    contents = {snapshot: content_of(host, name, snapshot) for snapshot in kept}
    now = content_of(host, name), content_of(host, f"{name}-a")
    collected = gc.collect(host)
    assert collected and all(item.is_done for item in collected)
    assert len(query.get(host, name).record.layers) == 6  # the four, the merged rest, and the top
    assert {snapshot: content_of(host, name, snapshot) for snapshot in kept} == contents
    assert (content_of(host, name), content_of(host, f"{name}-a")) == now
    assert gc.collect(host) == ()
    compact.compact(host, f"{name}-a", depth=2)
    assert content_of(host, f"{name}-a") == now[1]
    assert len(query.get(host, f"{name}-a").record.layers) == 4
    lifecycle.delete(host, f"{name}-a")
    assert content_of(host, name, "s20") == contents["s20"]


def test_who_goes_back_lets_go_of_what_another_has_compacted(host: Host, mode: Mode, name: str) -> None:
    make(host, mode, name)
    deepen(host, name, 4)
    copies.copy(host, copies.Request(source=name, name=f"{name}-a", snapshot="s3", start=False))
    snapshots.take(host, f"{name}-a", Take(name="here"))
    for snapshot in ("s0", "s1", "s2"):
        snapshots.delete(host, name, snapshot)
    assert compact.compact(host, name, depth=2) == 3
    now = content_of(host, f"{name}-a")
    assert len(query.get(host, f"{name}-a").record.layers) >= 5  # it has not heard of it
    snapshots.revert(host, f"{name}-a", "here")
    assert (content_of(host, f"{name}-a"), content_of(host, name, "s3")) == (now, now)
    assert gc.collect(host) == ()


@pytest.mark.only_mode(Mode.VM, "a container has neither NVRAM nor a kernel of its own")
def test_nvram_and_kernel_go_with_a_snapshot(host: Host, mode: Mode, name: str) -> None:
    record = make(host, mode, name)
    store = host.store

    def put(nvram: bytes, release: str, kernel: bytes) -> None:
        """What a boot, and `hvctl kernel`, leave."""
        store.nvram(record.uuid).write_bytes(nvram)
        now = query.get(host, name).record
        operation.write_record(host, effects.get_domain(host, now), replace(now, kernel_release=release))
        if release != record.kernel_release:
            for path in (store.kernel(record.uuid), store.initrd(record.uuid)):
                path.unlink()
                path.write_bytes(kernel)

    put(b"first", record.kernel_release, b"")
    of_image = store.kernel(record.uuid).read_bytes()
    snapshots.take(host, name, Take(name="first"))
    put(b"second", "1-new", b"kernel 1-new")
    snapshots.take(host, name, Take(name="second"))
    snapshots.take(host, name, Take(name="again"))
    for snapshot, nvram, kernel in (("first", b"first", of_image), ("again", b"second", b"kernel 1-new")):
        snapshots.revert(host, name, snapshot)
        assert store.nvram(record.uuid).read_bytes() == nvram
        assert store.kernel(record.uuid).read_bytes() == kernel
        assert query.get(host, name).record.kernel_release == (
            "1-new" if snapshot == "again" else record.kernel_release
        )
        copies.copy(host, copies.Request(source=name, snapshot=snapshot, name=f"{name}-{snapshot}", start=False))
        copied = query.get(host, f"{name}-{snapshot}").record
        assert (store.nvram(copied.uuid).read_bytes(), store.kernel(copied.uuid).read_bytes()) == (nvram, kernel)
    links = {
        (store.snapshots(record.uuid) / item.id / "vmlinuz") for item in query.get(host, name).record.snapshots[1:]
    }
    assert len({path.stat().st_ino for path in links}) == 1  # the same kernel lies there once


def test_a_schedule_takes_what_is_due_and_never_deletes_what_somebody_named(
    host: Host, settings: Config, mode: Mode, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(host, mode, name)
    snapshots.take(host, name, Take(name="mine"))
    assert run(settings, "set", name, "--keep", "hourly=1").status == 0
    assert run(settings, "set", name, "--keep", "yearly=1").status == 7
    first = run(settings, "snapshot", "tick").out
    assert first.startswith(f"{name}: snapshot auto-")
    ((_id, taken_at),) = schedule.list_automatic(query.get(host, name).record)
    tick = schedule.tick
    monkeypatch.setattr(schedule, "tick", functools.partial(tick, now=taken_at))
    assert call(settings, "snapshot", "tick") == Ran(status=0, out="", err="")
    (ticked,) = tick(host, now=taken_at + datetime.timedelta(hours=1))
    assert ticked.error is None
    assert ticked.expired == (first.split()[-1],)
    assert [item.name for item in query.get(host, name).record.snapshots] == ["mine", ticked.taken]
    assert run(settings, "set", name, "--keep", "none").status == 0
    assert tick(host) == ()


@pytest.fixture(scope="module")
def image_with_files(host: Host, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny image with a file system on its disk."""
    disk = tmp_path_factory.mktemp("image") / "disk"
    layereddisk.make_file_system(disk, 4 * MIB, "-t", "ext4", "-O", "^has_journal")
    return tiny.publish(host, "tiny-files", disk=disk)


def test_differences_are_listed(host: Host, settings: Config, mode: Mode, name: str, image_with_files: str) -> None:
    spec = tiny.make_spec(name, mode, image_with_files)
    create.create(host, create.Request(spec=spec, start=False))
    for values in ((1, 1), (2, 0, 1)):
        record = query.get(host, name).record
        for slot, value in enumerate(values):
            stacks.write_file(host, record, slot, value)
        snapshots.take(host, name, Take(name="one" if len(values) == 2 else "two"))
    wanted = "changed /slot0\nremoved /slot1\nadded   /slot2\n"
    assert run(settings, "snapshot", "diff", name, "one", "two").out == wanted
    assert run(settings, "snapshot", "diff", name, "one").out == wanted
    assert run(settings, "snapshot", "diff", name, "two").out == "no file differs\n"
    found = json.loads(run(settings, "snapshot", "diff", name, "two", "one", "--json").out)
    assert found[0] == {"change": "changed", "path": "/slot0"}


@pytest.mark.only_mode(Mode.VM, "a container has no disk")
def test_what_stands_on_many_layers_is_published_whole(
    host: Host, mode: Mode, name: str, image_with_files: str, tmp_path: Path
) -> None:
    create.create(host, create.Request(spec=tiny.make_spec(name, mode, image_with_files), start=False))
    for slot in range(3):
        stacks.write_file(host, query.get(host, name).record, slot, slot + 5)
        snapshots.take(host, name, Take(name=f"after-{slot}"))
    told: list[Event] = []
    made = publish.publish(host, publish.Publication(instance=name, image=f"{name}-made"), told.append)
    assert made.disk is not None
    raw = tmp_path / "raw"
    words = ["qemu-img", "convert", "-O", "raw", str(host.store.image(made.id) / made.disk.artefact.file), str(raw)]
    subprocess.run(words, check=True, timeout=60)
    for slot in range(3):
        command = ["debugfs", "-R", f"cat slot{slot}", str(raw)]
        assert subprocess.run(command, capture_output=True, check=True, timeout=60).stdout == str(slot + 5).encode()
    assert any(isinstance(event, Progress) and event.task == "copying the disk" and event.is_bytes for event in told)
    images.delete(host, f"{name}-made")


@pytest.mark.only_mode(Mode.VM, "a container's files are the host's")
def test_files_that_cannot_be_read_are_not_compared(host: Host, settings: Config, mode: Mode, name: str) -> None:
    make(host, mode, name)
    snapshots.take(host, name, Take(name="one"))
    refused = run(settings, "snapshot", "diff", name, "one")
    assert refused.status == 6
    assert f"cannot compare the files of '{name}': there is no Linux root on its disk (found: unknown)" in refused.err


def test_a_stack_has_a_limit_and_says_it(host: Host, mode: Mode, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make(host, mode, name)
    monkeypatch.setattr(layers, "DEEPEST", 3)
    deepen(host, name, 2)
    write(host, name, 0, 99)
    before = world.look(host)
    with pytest.raises(WrongState, match="3 layers"):
        snapshots.take(host, name, Take(name="more"))
    assert world.differences(before, world.look(host)) == []


def test_without_space_nothing_is_begun(host: Host, mode: Mode, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make(host, mode, name)
    write(host, name, 0, 1)
    snapshots.take(host, name, Take(name="one"))
    before = world.look(host)
    monkeypatch.setattr(layers, "_RESERVE_BYTES", 2**60)
    full = copies.Request(source=name, name=f"{name}-x", snapshot="one", is_full=True, start=False)
    for deed in (lambda: snapshots.take(host, name, Take(name="two")), lambda: copies.copy(host, full)):
        with pytest.raises(HostError, match="not enough space"):
            deed()
    assert world.differences(before, world.look(host)) == []


@dataclass
class Known:
    """What the model knows of one instance."""

    now: stacks.Content = stacks.EMPTY
    snapshots: dict[str, stacks.Content] = field(default_factory=dict)


_ALL_EVERY = 20


def play(host: Host, mode: Mode, name: str, operations: int) -> None:
    """Random operations on instances and on a model of them; after each, what was touched must be equal, now and then all."""
    dice = campaign.dice(f"model of instances that are off, {mode}, {operations} operations")
    known = {name: Known()}
    make(host, mode, name)
    for number in range(1, operations + 1):
        one = dice.choice(sorted(known))
        step(host, dice, known, one, number)
        for touched in {one, *(other for other in known if other.endswith(f"-{number}"))} & set(known):
            model = known[touched]
            assert content_of(host, touched) == model.now, (number, touched)
            for snapshot in dice.sample(sorted(model.snapshots), min(2, len(model.snapshots))):
                assert content_of(host, touched, snapshot) == model.snapshots[snapshot], (number, touched, snapshot)
        if number % _ALL_EVERY == 0 or number == operations:
            check_all(host, known, number)
    assert gc.collect(host) == ()  # and no layer without an owner


def check_all(host: Host, known: dict[str, Known], number: int) -> None:
    for one, model in known.items():
        assert content_of(host, one) == model.now, (number, one)
        found = snapshots.list_snapshots(query.get(host, one).record)
        assert {item.name: content_of(host, one, item.name) for item in found} == model.snapshots, (number, one)


def step(host: Host, dice: random.Random, known: dict[str, Known], one: str, number: int) -> None:
    model = known[one]
    deed = dice.choices(("write", "take", "revert", "delete", "copy", "remove", "compact"), (8, 6, 4, 4, 2, 1, 1))[0]
    if deed == "write":
        slot, value = dice.randrange(stacks.SLOTS), dice.choice((0, *range(1, 256)))
        write(host, one, slot, value)
        model.now = (*model.now[:slot], value, *model.now[slot + 1 :])
    elif deed == "take":
        taken = f"s{number}"
        snapshots.take(host, one, Take(name=taken))
        model.snapshots[taken] = model.now
    elif deed in ("revert", "delete") and model.snapshots:
        snapshot = dice.choice(sorted(model.snapshots))
        if deed == "revert":
            snapshots.revert(host, one, snapshot)
            model.now = model.snapshots[snapshot]
        else:
            snapshots.delete(host, one, snapshot)
            del model.snapshots[snapshot]
    elif deed == "copy" and len(known) < 4:
        source = dice.choice(["", *sorted(model.snapshots)])
        new = f"{min(known)}-{number}"
        is_full = dice.random() < 0.3
        copies.copy(host, copies.Request(source=one, snapshot=source, name=new, is_full=is_full, start=False))
        known[new] = Known(now=model.snapshots[source] if source else model.now)
    elif deed == "compact":
        compact.compact(host, one, depth=2)
    elif deed == "remove" and len(known) > 1 and one != min(known):
        lifecycle.delete(host, one)
        del known[one]


@pytest.mark.parametrize("operations", [80, pytest.param(500, marks=pytest.mark.long)])
def test_random_operations_agree_with_a_model(host: Host, mode: Mode, name: str, operations: int) -> None:
    play(host, mode, name, operations)
