"""`image build -f` with the real buildah: FROM an image of this store, which stays what it is unless it is told otherwise."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from hvctl import gc
from hvctl.errors import CommandFailed, HvctlError, InvalidSpec, NotFound
from hvctl.events import Event, Progress, Sink, ignore
from hvctl.host import Host
from hvctl.model import Image, Process
from hvctl.rootfs import building, containerfile, published
from hvctl.rootfs.building import Building
from hvctl.rootfs.containerfile import Recipe
from hvctl.units import MIB
from tests import cli, layouts, registry, stores, trees, victims
from tests.test_halves import add, plain, prepare

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="images are root's"),
    pytest.mark.skipif(shutil.which("buildah") is None, reason="buildah is not installed"),
]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A store with a small system that has a shell."""
    host = Host(prepare(tmp_path))

    def fill(work: Building) -> Image:
        for folder in ("bin", "etc", "sbin", "usr/lib/hvctl", "tmp"):
            (work.rootfs / folder).mkdir(parents=True)
        shutil.copy2("/bin/busybox", work.rootfs / "bin/busybox")
        for name in ("bin/sh", "bin/cat", "bin/id", "sbin/init"):
            (work.rootfs / name).symlink_to("/bin/busybox")
        (work.rootfs / "etc/os-release").write_text("ID=small\nVERSION_ID=1\n")
        (work.rootfs / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
        (work.rootfs / "etc/theirs").write_text("x")
        os.chown(work.rootfs / "etc/theirs", 1000, 100)
        os.setxattr(work.rootfs / "etc/theirs", "user.note", b"kept")
        os.utime(work.rootfs / "etc/theirs", (1_600_000_000, 1_600_000_000))  # layers keep whole seconds
        return replace(
            plain("base"), os="small", version="1", packages=("one",), has_tree=True, tree_digest="sha256:" + "1" * 64
        )

    add(host, "base", fill)
    return host


def build(host: Host, tmp_path: Path, text: str, events: Sink = ignore, *, has_network: bool = False) -> Image:
    context = tmp_path / "context"
    context.mkdir(exist_ok=True)
    (context / "file").write_text("copied")
    (tmp_path / "Containerfile").write_text(text)
    recipe = Recipe(name="made", file=tmp_path / "Containerfile", context=context, has_network=has_network)
    return containerfile.build(host, recipe, events)


def test_from_a_system_it_is_a_system(host: Host, tmp_path: Path) -> None:
    image = build(
        host, tmp_path, "FROM hvctl/base AS one\nRUN id > /who\nFROM one\nCOPY file /etc/file\nRUN rm /etc/passwd\n"
    )
    base = published.get_image(host, "base")
    assert image.process is None
    assert (image.os, image.provision, image.packages) == (base.os, base.provision, base.packages)
    tree = host.store.image_tree(image.id)
    assert (tree / "who").read_text().startswith("uid=0")
    assert (tree / "etc/file").read_text() == "copied"
    assert not (tree / "etc/passwd").exists()
    mine, theirs = trees.fingerprint(tree), trees.fingerprint(host.store.image_tree(base.id))
    assert mine["etc/theirs"] == theirs["etc/theirs"]
    assert gc.collect_building(host) == []


def test_with_a_command_it_is_an_application(host: Host, tmp_path: Path) -> None:
    image = build(host, tmp_path, 'FROM localhost/base\nENV A=b\nENTRYPOINT ["/bin/cat"]\nCMD ["/etc/os-release"]\n')
    assert image.process is not None
    assert (image.process.entrypoint, image.process.command) == (("/bin/cat",), ("/etc/os-release",))
    assert ("A", "b") in image.process.environment


def test_from_an_application_its_settings_are_kept(host: Host, tmp_path: Path) -> None:
    def fill(work: Building) -> Image:
        work.rootfs.parent.mkdir(mode=0o700)
        shutil.copytree(host.store.image_tree(published.get_image(host, "base").id), work.rootfs, symlinks=True)
        process = Process(
            entrypoint=("/bin/cat", "-u"), command=("a b",), environment=(("K", "v w"),), user="7", directory="/etc"
        )
        return replace(plain("app"), has_tree=True, tree_digest="sha256:" + "2" * 64, process=process)

    add(host, "app", fill)
    process = build(host, tmp_path, "FROM hvctl/app\nCOPY file /file\n").process
    assert process is not None
    assert (process.entrypoint, process.command) == (("/bin/cat", "-u"), ("a b",))
    assert (("K", "v w") in process.environment, process.user, process.directory) == (True, "7", "/etc")


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("FROM hvctl/base\nRUN exit 3\n", CommandFailed, "RUN exit 3"),
        ("FROM hvctl/base\nCOPY nothing /\n", CommandFailed, "COPY nothing"),
        ("FROM hvctl/nothing\n", NotFound, "nothing"),
        ("RUN true\n", InvalidSpec, "no FROM"),
    ],
)
def test_what_fails_is_named_and_nothing_stays(
    host: Host, tmp_path: Path, text: str, kind: type[Exception], words: str
) -> None:
    before = sorted(host.store.root.rglob("*"))
    with pytest.raises(kind, match=words) as caught:
        build(host, tmp_path, text)
    assert "\n" not in str(caught.value)
    assert sorted(host.store.root.rglob("*")) == before


def test_a_command_sees_no_network_and_no_process_of_the_host(host: Host, tmp_path: Path) -> None:
    script = "FROM hvctl/base\nRUN cat /proc/net/dev /proc/net/unix > /net; cat /proc/[0-9]*/cmdline > /processes\n"
    tree = host.store.image_tree(build(host, tmp_path, script).id)
    links = [line.split(":")[0].strip() for line in (tree / "net").read_text().splitlines() if ":" in line]
    assert "lo" in links
    assert set(links) & links_here() == {"lo"}
    seen = (tree / "processes").read_bytes()
    assert b"cat" in seen and Path("/proc/self/cmdline").read_bytes() not in seen
    before = links_here()
    tree = host.store.image_tree(build(host, tmp_path, script, has_network=True).id)
    stayed = before & links_here()  # others, of guests of this host's, come and go
    assert {name for name in stayed if name not in (tree / "net").read_text()} == set()


def links_here() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


@pytest.mark.apart
@pytest.mark.guest  # a server of its own
def test_what_it_is_from_comes_by_the_network_all_the_same(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layouts.write(tmp_path / "layout", [layouts.base()], {"Cmd": ["id"]})
    with registry.serving(tmp_path) as server:
        reference = server.push(layout, "app:1").removeprefix("docker://")
        (tmp_path / "registries.conf").write_text(
            f'[[registry]]\nlocation = "{reference.split("/")[0]}"\ninsecure = true\n'
        )
        monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(tmp_path / "registries.conf"))
        text = f"FROM {reference}\nRUN cat /proc/net/dev > /net\n"
        tree = host.store.image_tree(build(host, tmp_path, text).id)
    assert (tree / "net").read_text().count(":") == 1
    assert (tree / "bin/busybox").exists()


@pytest.mark.parametrize(
    ("step", "has_network", "is_told"),
    [("RUN false", False, True), ("RUN false", True, False), ("COPY nothing /", False, False)],
)
def test_a_command_that_failed_without_the_network_is_told_how_to_get_it(
    host: Host, tmp_path: Path, step: str, has_network: bool, is_told: bool
) -> None:
    with pytest.raises(CommandFailed) as caught:
        build(host, tmp_path, f"FROM hvctl/base\n{step}\n", has_network=has_network)
    assert ("--network host" in caught.value.hint) is is_told


def test_a_name_that_goes_to_another_image_is_told_with_both(host: Host, tmp_path: Path) -> None:
    told: list[Event] = []
    first = build(host, tmp_path, "FROM hvctl/base\nRUN echo 1 > /which\n", told.append)
    assert "was" not in stores.notes(told)
    again = build(host, tmp_path, "FROM hvctl/base\nRUN echo 2 > /which\n", told.append)
    said = f"was {first.id[:12]}, is now {again.id[:12]}; instances keep what they stand on"
    assert stores.notes(told).splitlines()[-1] == said
    assert published.read(host, first.id, "old").id == first.id  # until `prune`, which asks who stands on it


STEPS = ("preparing", "step 1", "step 2", "step 3", "unpacking", "publishing")
_THREE_STEPS = "FROM hvctl/base\nRUN id > /who\nCOPY file /etc/file\n"


def _die_at(task: str, tmp_path: Path, host: Host, _name: str) -> Image:
    def kill(event: Event) -> None:
        if isinstance(event, Progress) and event.task.startswith(task):
            os.kill(os.getpid(), 9)

    return build(host, tmp_path, _THREE_STEPS, kill)


@pytest.mark.apart
@pytest.mark.guest  # no guest, but processes of its own, and seconds
@pytest.mark.parametrize("task", STEPS)
def test_killed_at_any_step_nothing_but_what_gc_takes_is_left(host: Host, tmp_path: Path, task: str) -> None:
    before = stores.content(host)
    victims.die_in(host.config, functools.partial(_die_at, task, tmp_path), "made")
    (left,) = host.store.building.iterdir()
    # What it had started goes on to its end, and holds the lock.
    cli.wait_for(lambda: not host.is_busy(f"building-{left.name}"))
    assert not host.is_busy(f"building-{left.name}")
    assert published.find_image(host, "made") is None
    assert gc.collect_building(host) != []
    assert stores.content(host) == before
    assert str(host.store.root) not in Path("/proc/mounts").read_text()
    build(host, tmp_path, _THREE_STEPS)


@pytest.mark.apart
@pytest.mark.guest
@pytest.mark.parametrize("free_bytes", [2 * MIB, 5 * MIB, 12 * MIB])
def test_a_full_disk_leaves_nothing(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_bytes: int
) -> None:
    monkeypatch.setattr(building, "check_space", lambda *_arguments: None)  # it filled up meanwhile
    base_bytes = sum(path.stat().st_size for path in host.store.root.rglob("*") if path.is_file())
    small = tmp_path / "small"
    small.mkdir()
    options = f"size={base_bytes + 4 * MIB + free_bytes}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(small)], check=True, timeout=30)
    try:
        full = Host(prepare(small))
        for name in ("images", "tags"):
            source, target = getattr(host.store, name), getattr(full.store, name)
            subprocess.run(["cp", "--archive", f"{source}/.", str(target)], check=True, timeout=30)
        before = stores.content(full)
        with pytest.raises(HvctlError, match=r"(?i)no space|full"):
            build(full, tmp_path, "FROM hvctl/base\nRUN cat /bin/busybox /bin/busybox > /a\nCOPY file /etc/file\n")
        assert stores.content(full) == before
    finally:
        subprocess.run(["umount", str(small)], check=True, timeout=30)
