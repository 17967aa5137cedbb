"""`image build -f` with the real buildah: FROM an image of this store, which stays what it is unless it is told otherwise."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from hvctl import gc
from hvctl.errors import CommandFailed, InvalidSpec, NotFound
from hvctl.host import Host
from hvctl.model import Image, Process
from hvctl.rootfs import containerfile, published
from hvctl.rootfs.building import Building
from hvctl.rootfs.containerfile import Recipe
from tests import trees
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


def build(host: Host, tmp_path: Path, text: str) -> Image:
    context = tmp_path / "context"
    context.mkdir(exist_ok=True)
    (context / "file").write_text("copied")
    (tmp_path / "Containerfile").write_text(text)
    recipe = Recipe(name="made", file=tmp_path / "Containerfile", context=context)
    return containerfile.build(host, recipe, lambda _event: None)


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
