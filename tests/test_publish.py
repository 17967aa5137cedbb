"""An image of what an instance has become, exported to one file, imported into an empty store, started in the other mode."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hvctl import gc, images
from hvctl.access import keys
from hvctl.config import Config
from hvctl.events import Sink
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.instances import create, enter, lifecycle, publish, query
from hvctl.instances.create import Request
from hvctl.instances.publish import Publication
from hvctl.instances.verbs import PUBLISH
from hvctl.model import Mode, Spec, State
from hvctl.rootfs import bundles, published
from hvctl.units import MIB
from tests import cli, roots, tiny, victims

pytestmark = pytest.mark.guest

# What somebody does in an instance: files of several owners, one of the image's removed, a directory made anew.
_LIFE = r"""
set -eu
useradd --create-home --uid 1234 somebody
echo mine > /home/somebody/file
chown somebody:somebody /home/somebody/file
ln /home/somebody/file /home/somebody/again
cp /bin/cat /usr/local/bin/setuid-cat
chmod 4755 /usr/local/bin/setuid-cat
rm /usr/share/base-files/motd
rm -r /usr/share/base-files/profile* || :
mv /etc/skel /etc/skel.old
mkdir /etc/skel
echo new > /etc/skel/only
mkdir -p /var/log/journal/x
echo log > /var/log/journal/x/system.journal
ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key
echo secret > /tmp/left
sync
"""
_LOOK = r"""
stat -c '%U %h' /home/somebody/file
stat -c %a /usr/local/bin/setuid-cat
ls /usr/share/base-files/motd /etc/ssh/ssh_host_ed25519_key /var/log/journal/x /tmp/left 2>/dev/null || :
ls -A /etc/skel
"""
_SEEN = ["somebody 2", "4755", "only"]


@dataclass(frozen=True)
class Pair:
    """An instance, and the image that was made of it."""

    instance: str
    image: str


def make(host: Host, name: str, mode: Mode, image: str) -> str:
    spec = Spec(name=name, mode=mode, image=image, cpus=2, memory_bytes=512 * MIB)
    create.create(
        host, Request(spec=spec, authorized_keys=(keys.ensure_own_key(),))
    )  # until sshd: then /tmp is emptied
    return name


def sh(host: Host, name: str, script: str) -> list[str]:
    done = enter.exec_(host, name, ("sh", "-s"), script.encode())
    assert done.status == 0, done.stderr.decode()
    return done.stdout.decode().split("\n")[:-1]


def identity(host: Host, name: str) -> list[str]:
    """What no two systems share."""
    return sh(
        host, name, "cat /etc/machine-id /etc/hostname; ssh-keygen -lf /run/hvctl/ssh_host_ed25519_key | cut -c1-60"
    )


@pytest.fixture(scope="module")
def made(host: Host, debian_image: str, mode: Mode) -> Iterator[Pair]:
    """A running instance with a life behind it, and an image that was published of it meanwhile."""
    name, image = f"live-{mode.value}", f"of-{mode.value}"
    make(host, name, mode, debian_image)
    sh(host, name, _LIFE)
    publish.publish(host, Publication(instance=name, image=image))
    yield Pair(instance=name, image=image)
    for instance in [item.name for item in host.instances() if item.record.spec.image == image or item.name == name]:
        lifecycle.delete(host, instance)
    images.delete(host, image)


def test_it_goes_on_as_it_was(host: Host, made: Pair) -> None:
    instance = query.get(host, made.instance)
    assert (instance.state, instance.record.pending) == (State.RUNNING, None)
    assert sh(host, made.instance, "cat /tmp/left; touch /root/written; sync") == ["secret"]


OTHER = {Mode.VM: Mode.CONTAINER, Mode.CONTAINER: Mode.VM}
WHERE = pytest.mark.parametrize("where", ["the other", pytest.param("the same", marks=pytest.mark.long)])
"""In which mode an instance is made of what was published; that it works in the other one proves the most."""


@WHERE
def test_an_instance_of_it_runs_and_is_another(host: Host, made: Pair, mode: Mode, where: str) -> None:
    new_mode = OTHER[mode] if where == "the other" else mode
    name = make(host, f"{made.image}-{new_mode.value}", new_mode, made.image)
    assert sh(host, name, _LOOK) == _SEEN
    known = [identity(host, each) for each in (made.instance, name)]
    for values in zip(*known, strict=True):
        assert len(set(values)) == len(values), values
    assert where == "the same" or images.get(host, made.image).made
    lifecycle.delete(host, name)


@pytest.mark.long_in(Mode.CONTAINER)  # test_bundles.py has what is in the file
@pytest.mark.parametrize(
    "targets", [(Mode.CONTAINER,), pytest.param((Mode.VM,), marks=pytest.mark.long)], ids=["as-container", "as-vm"]
)
def test_exported_it_starts_elsewhere(
    host: Host, elsewhere: Host, made: Pair, tmp_path: Path, targets: tuple[Mode, ...]
) -> None:
    """Through the command line, and through a pipe."""
    done = cli.run_bytes(host.config, "image", "export", made.image, "-")
    assert done.returncode == 0, done.stderr
    arrived = cli.run_bytes(elsewhere.config, "image", "import", "-", "--name", "arrived", stdin=done.stdout)
    assert arrived.returncode == 0, arrived.stderr
    here, there = published.get_image(host, made.image), published.get_image(elsewhere, "arrived")
    assert here.id == there.id
    for new_mode in targets:
        name = make(elsewhere, f"there-{new_mode.value}", new_mode, "arrived")
        assert sh(elsewhere, name, _LOOK) == _SEEN
        lifecycle.delete(elsewhere, name)
    assert gc.collect(elsewhere) == ()
    again = bundles.export(elsewhere, "arrived", tmp_path / "again")
    assert (tmp_path / "again").stat().st_size == again.size_bytes
    images.delete(elsewhere, "arrived")
    assert files.list_names(elsewhere.store.images) == []


def _publish(host: Host, name: str, events: Sink) -> object:
    return publish.publish(host, Publication(instance=name, image="of-killed"), events)


def test_killed_while_it_is_held_still_gc_lets_it_go_on(host: Host, settings: Config, made: Pair) -> None:
    victims.die_at(settings, _publish, PUBLISH.name, "copy", made.instance)
    assert query.get(host, made.instance).live.state is State.PAUSED
    gc.collect(host)
    assert query.get(host, made.instance).state is State.RUNNING
    assert sh(host, made.instance, "echo again > /root/again; sync; cat /root/again") == ["again"]
    assert published.find_image(host, "of-killed") is None
    assert files.list_names(host.store.building) == []


@pytest.mark.long_in(Mode.CONTAINER)  # both are held still by the same steps
def test_what_is_paused_is_published_and_stays_paused(host: Host, made: Pair) -> None:
    lifecycle.pause(host, made.instance)
    publish.publish(host, Publication(instance=made.instance, image="of-paused"))
    assert query.get(host, made.instance).state is State.PAUSED
    lifecycle.resume(host, made.instance)
    images.delete(host, "of-paused")


def _edit(root: Path, first_id: int) -> None:
    (root / "etc/new").write_text("new\n")
    os.chown(root / "etc/new", first_id + 5, first_id + 6)
    (root / "var/log/old").unlink()
    (root / "tmp").mkdir()
    (root / "tmp/left").touch()


@pytest.mark.apart
def test_stopped_it_is_published_too(host: Host, root_image: str, mode: Mode) -> None:
    names = ("off", "off-again")
    try:
        create.create(host, Request(spec=tiny.make_spec(names[0], mode, root_image), start=False))
        roots.change(host, query.get(host, names[0]).record, _edit)
        publish.publish(host, Publication(instance=names[0], image="of-stopped"))
        create.create(host, Request(spec=tiny.make_spec(names[1], mode, "of-stopped"), start=False))
        was, shown = (roots.look(host, query.get(host, name).record) for name in names)
        assert shown["etc/new"] == was["etc/new"] and shown["etc/new"][1:3] == (5, 6)
        assert "etc/motd" in shown
        assert not {"var/log/old", "tmp/left"} & set(shown)
    finally:
        for name in names:
            if query.find(host, name) is not None:
                lifecycle.delete(host, name)
        images.delete(host, "of-stopped")
