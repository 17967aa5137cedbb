"""Random operations on real, running guests against a pure model of them, conversions among them; the seed is printed.

What is off has its model in test_snapshots.py, with many more operations.
"""

from __future__ import annotations

import hashlib
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hvctl import gc
from hvctl.config import Config
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.hostside import layers as layer_files
from hvctl.instances import convert, copies, lifecycle, query, snapshots
from hvctl.instances.snapshots import Take
from hvctl.model import Mode, Wait
from tests import campaign
from tests.test_guest import make
from tests.test_snapshots_guest import inside

pytestmark = pytest.mark.guest

NAME, COPY = "played", "played-too"
SLOTS = 3
FOLDER = "/root/played"
_DEEDS = {"write": 7, "take": 5, "revert": 4, "delete": 2, "restart": 1, "copy": 1, "convert": 3}

Content = tuple[str, ...]
"""What each of the guest's files holds; empty: it is not there."""
_EMPTY: Content = ("",) * SLOTS


@dataclass(frozen=True)
class Kept:
    """A snapshot as it must stay: what the guest had, in which mode, and the hashes of all layers it stands on."""

    content: Content
    mode: Mode
    layers: dict[str, str]


@dataclass
class Model:
    mode: Mode
    now: Content = _EMPTY
    kept: dict[str, Kept] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("first", "operations"),
    [
        (Mode.CONTAINER, 8),
        pytest.param(Mode.CONTAINER, 25, marks=pytest.mark.long),
        pytest.param(Mode.VM, 25, marks=pytest.mark.long),
        pytest.param(Mode.CONTAINER, 100, marks=pytest.mark.long),
    ],
)
def test_a_running_guest_that_changes_its_mode_agrees_with_a_model(
    host: Host, settings: Config, debian_image: str, first: Mode, operations: int
) -> None:
    dice = campaign.dice(f"model of a running guest, {first} at first, {operations} operations")
    model = Model(mode=first)
    make(host, NAME, first, debian_image, wait=Wait.AGENT)
    try:
        for number in range(1, operations + 1):
            is_due = number == operations // 2 + 1
            deed = "convert" if is_due else dice.choices(list(_DEEDS), list(_DEEDS.values()))[0]
            do(host, settings, dice, model, deed, number)
            check(host, settings, model, f"{number}: {deed}")
        go_back_to_each(host, settings, model)
        assert gc.collect(host) == ()
    finally:
        for name in (NAME, COPY):
            if query.find(host, name) is not None:
                lifecycle.delete(host, name)


def do(host: Host, settings: Config, dice: random.Random, model: Model, deed: str, number: int) -> None:
    """One operation on the guest and on its model; nothing where there is no snapshot to do it with."""
    own = sorted(name for name, kept in model.kept.items() if kept.mode is model.mode)
    if deed == "write":
        slot, text = dice.randrange(SLOTS), dice.choice(("", dice.randbytes(8).hex()))
        change = f"printf %s {text} > {FOLDER}/{slot}" if text else f"rm -f {FOLDER}/{slot}"
        inside(settings, NAME, f"mkdir -p {FOLDER}; {change}; sync")
        model.now = (*model.now[:slot], text, *model.now[slot + 1 :])
    elif deed == "take":
        taken = snapshots.take(host, NAME, Take(name=f"s{number}"))
        model.kept[taken.name] = Kept(model.now, model.mode, hash_layers(host, taken.layer))
    elif deed == "revert" and own:
        go_back(host, model, dice.choice(own))
    elif deed == "delete" and model.kept:
        gone = dice.choice(sorted(model.kept))
        snapshots.delete(host, NAME, gone)
        del model.kept[gone]
    elif deed == "restart":
        lifecycle.restart(host, NAME, goal=Wait.AGENT)
    elif deed == "copy":
        source = dice.choice(["", *own])
        copies.copy(host, copies.Request(source=NAME, snapshot=source, name=COPY, wait=Wait.AGENT))
        assert content_of(settings, COPY) == hashes(model.kept[source].content if source else model.now)
        lifecycle.delete(host, COPY)
    elif deed == "convert":
        change_mode(host, model)


def change_mode(host: Host, model: Model) -> None:
    model.mode = Mode.VM if model.mode is Mode.CONTAINER else Mode.CONTAINER
    convert.convert(host, convert.Request(name=NAME, mode=model.mode))


def go_back(host: Host, model: Model, name: str) -> None:
    snapshots.revert(host, NAME, name, force=True, goal=Wait.AGENT)
    model.now = model.kept[name].content


def go_back_to_each(host: Host, settings: Config, model: Model) -> None:
    """Every snapshot still shows what it was taken of, in its own mode."""
    for name in sorted(model.kept, key=lambda name: model.kept[name].mode is not model.mode):
        if model.kept[name].mode is not model.mode:
            change_mode(host, model)
        go_back(host, model, name)
        check(host, settings, model, f"back to {name}")


def check(host: Host, settings: Config, model: Model, when: str) -> None:
    """The guest has what the model has, and nothing that any snapshot stands on has changed."""
    record = query.get(host, NAME).record
    assert record.mode is model.mode, when
    found = {item.name: item for item in snapshots.list_snapshots(record)}
    assert {name: item.mode for name, item in found.items()} == {n: kept.mode for n, kept in model.kept.items()}, when
    for name, kept in model.kept.items():
        assert hash_layers(host, found[name].layer) == kept.layers, (when, name)
    assert content_of(settings, NAME) == hashes(model.now), when


def content_of(settings: Config, name: str) -> Content:
    """SHA-256 of each file, as the guest itself tells it; empty: it is not there."""
    script = f"cd {FOLDER} 2> /dev/null && sha256sum * 2> /dev/null || :"
    lines = [line.split() for line in inside(settings, name, script).splitlines()]
    told = {slot: digest for digest, slot in lines}
    return tuple(told.get(str(slot), "") for slot in range(SLOTS))


def hashes(content: Content) -> Content:
    return tuple(hashlib.sha256(text.encode()).hexdigest() if text else "" for text in content)


def hash_layers(host: Host, top: str) -> dict[str, str]:
    """Each layer of a stack -> a hash of all in it: names, owners, modes, content."""
    return {layer: hash_tree(host.store.layer(layer)) for layer in layer_files.list_stack(host.store.layers, top)}


def hash_tree(folder: Path) -> str:
    digest = hashlib.sha256()
    for root, names in sorted((root, sorted((*folders, *names))) for root, folders, names in os.walk(folder)):
        for name in names:
            path = Path(root, name)
            facts = os.lstat(path)
            told = (os.path.relpath(path, folder), facts.st_mode, facts.st_uid, facts.st_gid, facts.st_rdev)
            digest.update(repr(told).encode())
            if path.is_symlink():
                digest.update(os.readlink(path).encode())
            elif path.is_file():
                digest.update(files.hash_file(path).encode())
    return digest.hexdigest()
