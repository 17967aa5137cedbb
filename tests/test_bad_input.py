"""The typical mistakes, and the malicious ones: one line, the right exit code, the next step, and nothing changed."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hvctl.cli.app import App
from hvctl.cli.main import run_command
from hvctl.config import Config
from hvctl.host import Host
from hvctl.instances import create, lifecycle, query
from hvctl.units import MIB
from tests import payloads, tiny, world
from tests.cli import Ran, call_here, environment, run, run_bytes
from tests.payloads import PAYLOADS

pytestmark = [pytest.mark.guest, pytest.mark.apart]


@pytest.fixture
def here(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process works on the test's settings, as one that the user started would."""
    for name, value in environment(settings).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def unchanged(host: Host, tiny_image: str) -> Iterator[None]:
    """Fails the test when anything on the host has changed in the end."""
    before = world.look(host)
    yield
    assert world.differences(before, world.look(host)) == []


def assert_refused(done: Ran, status: int, *words: str) -> None:
    """One line that names the object and the next step, no traceback."""
    assert (done.status, done.out) == (status, ""), done
    lines = [line for line in done.err.splitlines() if ": accelerator " not in line]
    assert len(lines) == 1, done.err
    assert lines[0].startswith("hvctl: "), done.err
    assert "; next: " in lines[0], done.err
    assert all(word in lines[0] for word in words), done.err


CREATE = ("create", "--image", "tiny", "--no-start", "--memory", "128M")
CONTAINER = (*CREATE, "x", "--container")


@pytest.mark.parametrize(
    ("words", "status", "named"),
    [
        ((*CREATE, "Bad_Name"), 7, "Bad_Name"),
        (("create", "tiny", "x"), 2, "'tiny' is an image, and what stands here is what instances are to be called"),
        (("create", "x", "tiny", "y"), 2, "next: hvctl create x y --image tiny"),
        (("create", "tiny"), 2, "next: hvctl create NAME --image tiny"),
        (("create", "fedora-43", "x"), 2, "next: hvctl create x --image fedora-43"),
        (("create", "debian-13", "x"), 2, "next: hvctl create x --image debian-13"),
        (("create", "images:debian/12", "x"), 2, "next: hvctl create x --image images:debian/12"),
        (("create", "fedora-43", "--no-start"), 3, "there is no image 'debian-12'"),
        (("create", "x", "--image", "nosuch"), 3, "hvctl image list; which there could be: hvctl image catalogue"),
        (("create", "x", "--image", "docker://alpine"), 7, "hvctl image pull docker://alpine --name alpine"),
        (("create", "x", "--image", "oci:img:1"), 7, "hvctl image pull oci:img:1 --name img-1"),
        (("create", "x", "--image", "images:debian/12"), 7, "next: hvctl image pull images:debian/12"),
        (("create", "x", "--image", "/srv/a b.img"), 7, "cannot be the name of an image"),
        (("create", "x", "--image", "/srv/mine.img"), 7, "hvctl image import /srv/mine.img --name mine.img"),
        ((*CONTAINER, "--mount", "/nosuch:/data"), 7, "'/nosuch' is not there on this host; next: mkdir /nosuch"),
        ((*CONTAINER, "--mount", "/etc/passwd:/data"), 7, "share the one that it is in: --mount /etc:/data"),
        ((*CONTAINER, "--mount", "/srv:data"), 7, "'data' is no absolute path"),
        ((*CONTAINER, "--mount", "/srv:/da/../ta"), 7, "next: --mount /srv:/ta"),
        ((*CONTAINER, "--mount", "/srv://dev"), 7, "next: --mount /srv/data:/data"),
        (("run", "--env", "A=b", "tiny", "--", "env"), 255, "hvctl run tiny -- env K=V COMMAND"),
        ((*CREATE, "x", "--env", "A=b"), 7, "leave --env, --entrypoint, --user and the command away"),
        ((*CREATE, "x", "--template", "nosuch"), 3, "hvctl template list"),
        ((*CREATE, "x", "--memory", "lots"), 7, "lots"),
        ((*CREATE, "x", "--memory", "1M"), 7, "too little"),
        ((*CREATE, "x", "--memory", "900T"), 8, "more than this host has"),
        ((*CREATE, "x", "--disk", "1K"), 7, "smaller than image"),
        ((*CREATE, "x", "--disk", "900P"), 7, "not possible"),
        ((*CREATE, "x", "--cpus", "4000"), 7, "4000 CPUs"),
        ((*CREATE, "x", "--cpus", "0"), 2, "--cpus"),
        ((*CREATE, "x", "--nosuch"), 2, "--nosuch"),
        ((*CREATE, "x", "--set", "novalue"), 2, "novalue"),
        ((*CREATE, "x", "--set", "tmp=2.0", "--template", "uefi"), 7, "'uefi' knows no 'tmp'; next: did you mean tpm?"),
        ((*CREATE, "x", "--user-data", "/nosuch"), 3, "/nosuch"),
        ((*CREATE, "x", "--ssh-key", "/nosuch"), 3, "/nosuch"),
        ((*CREATE, "x", "--require-kvm", "--accel", "tcg"), 2, "--require-kvm"),
        (("nosuch",), 2, "nosuch"),
        (("show", "nosuch"), 3, "nosuch"),
        (("start", "nosuch"), 3, "nosuch"),
        (("delete", "--yes", "nosuch"), 3, "nosuch"),
        (("set", "nosuch"), 2, "nothing to change"),
        (("rename", "same", "same"), 2, "hvctl rename same NEW"),
        (("ssh", "nosuch"), 255, "nosuch"),
        (("console", "nosuch"), 3, "nosuch"),
        (("image", "delete", "--yes", "nosuch"), 3, "nosuch"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    here: None, unchanged: None, words: tuple[str, ...], status: int, named: str
) -> None:
    assert_refused(call_here(*words), status, named)


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("<domain>", "not well-formed"),
        ("<domain>{{ vars.speed }}</domain>", "--set speed="),
        ("<domain type='qemu'><name>{{ name }}</name><nonsense/></domain>", "schema"),
    ],
)
def test_a_template_with_a_fault_is_refused(
    here: None, unchanged: None, tmp_path: Path, source: str, named: str
) -> None:
    file = tmp_path / "mine.xml"
    file.write_text(source)
    assert_refused(call_here(*CREATE, "x", "--template", str(file)), 7, named)


FIELDS = [
    (*CREATE, "--", "{}"),
    (*CREATE, "x", "--template={}"),
    (*CREATE, "x", "--ssh-key={}"),
    (*CREATE, "x", "--user-data={}"),
    ("create", "x", "--no-start", "--image={}"),
    ("show", "--", "{}"),
    ("image", "show", "--", "{}"),
    ("image", "build", "--", "{}"),
    ("image", "build", "debian-12", "--package={}"),
]


@pytest.mark.parametrize("payload", [payload for payload in PAYLOADS if "\0" not in payload])  # argv cannot hold a NUL
@pytest.mark.parametrize("words", FIELDS, ids=lambda words: " ".join(word for word in words if word not in CREATE[1:]))
def test_no_payload_gets_through_a_field(here: None, tmp_path: Path, words: tuple[str, ...], payload: str) -> None:
    canary = tmp_path / "canary"
    done = call_here(*(word.replace("{}", payloads.aim(payload, canary)) for word in words))
    assert done.status in (2, 3, 7), done
    assert "Traceback" not in done.err
    assert not canary.exists()


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_in_a_variable_stays_a_text(here: None, unchanged: None, tmp_path: Path, payload: str) -> None:
    canary = tmp_path / "canary"
    done = call_here(*CREATE, "x", "--print-xml", f"--set=K={payloads.aim(payload, canary)}")
    assert done.status in (0, 7), done
    tags = {element.tag for element in ElementTree.fromstring(done.out or "<x/>").iter()}
    assert not [tag for tag in tags if "emulator" in tag or "commandline" in tag]
    assert not canary.exists()


def test_a_taken_name_is_refused(host: Host, here: None, tiny_image: str) -> None:
    create.create(host, create.Request(spec=tiny.make_spec("taken"), start=False))
    before = world.look(host)
    assert_refused(call_here(*CREATE, "taken"), 4, "taken")
    assert world.differences(before, world.look(host)) == []
    lifecycle.delete(host, "taken")


def test_a_domain_of_somebody_elses_is_left_alone(host: Host, here: None, tiny_image: str) -> None:
    name = f"foreign-{secrets.token_hex(2)}"
    xml = (
        f"<domain type='qemu'><name>{name}</name><memory>1024</memory><os><type arch='x86_64'>hvm</type></os></domain>"
    )
    virsh = ["virsh", "-c", host.config.vm_uri]
    subprocess.run([*virsh, "define", "/dev/stdin"], input=xml, text=True, check=True, timeout=60, capture_output=True)
    before = world.look(host)
    for words in (("delete", "--yes", name), ("start", name), (*CREATE, name), ("show", name)):
        assert_refused(call_here(*words), 9, name)
    assert world.differences(before, world.look(host)) == []
    subprocess.run([*virsh, "undefine", name], check=True, timeout=60, capture_output=True)


def test_an_image_that_vanished_is_named(host: Host, here: None, tiny_image: str) -> None:
    (host.store.tags / "vanished").write_text("0" * 64 + "\n")
    before = world.look(host)
    assert_refused(call_here("create", "x", "--image", "vanished"), 8, "vanished")
    assert world.differences(before, world.look(host)) == []
    (host.store.tags / "vanished").unlink()


def test_without_libvirtd_nothing_is_begun(settings: Config, unchanged: None) -> None:
    """Nor when only one of the two drivers is away: half the instances must never be taken for all of them."""
    socket = "?socket=/nosuch/socket"
    for nowhere in (
        replace(settings, vm_uri=f"qemu+unix:///system{socket}"),
        replace(settings, container_uri=f"lxc+unix:///system{socket}"),
    ):
        for words in ((*CREATE, "x"), ("list",), ("gc",), ("delete", "--yes", "x")):
            assert_refused(run(nowhere, *words), 8, "libvirt")


def test_a_user_without_permission_is_told_before_it_starts(settings: Config, unchanged: None) -> None:
    """In a process that was forked from ours and gave up root: the interpreter may lie where `nobody` cannot go."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        sys.stderr = os.fdopen(write, "w")
        os.environ.update(environment(settings))
        os.environ["HOME"] = "/nonexistent"
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        code = run_command(App(), [*CREATE, "x", "--ssh-key", tiny.PUBLIC_KEY])
        sys.stderr.flush()
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as stream:
        text = stream.read()
    _pid, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 8, text
    assert "root" in text
    assert len(text.splitlines()) == 1


@pytest.fixture
def full_disk(host: Host, settings: Config, tmp_path: Path) -> Iterator[Config]:
    """Settings whose store lies on a file system that is full but for 40 KiB."""
    store = tmp_path / "store"
    store.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,mode=711", "tmpfs", str(store)], check=True, timeout=10)
    try:
        small = replace(settings, store=store)
        for name in ("images", "tags", "layers", "instances", "building"):
            (store / name).mkdir()
        with Host(small) as on_small:
            tiny.publish(on_small, "tiny")
        filler = store / "filler"
        with filler.open("wb") as stream:
            stream.write(b"\0" * (shutil.disk_usage(store).free - 40 * 1024))
        yield small
    finally:
        subprocess.run(["umount", str(store)], check=True, timeout=10)


def test_a_full_disk_leaves_nothing(full_disk: Config) -> None:
    with Host(full_disk) as host:
        before = world.look(host)
        done = run(full_disk, *CREATE, "full")
        assert_refused(done, 8, "pace")
        assert world.differences(before, world.look(host)) == []


def test_of_two_processes_that_create_a_name_exactly_one_wins(host: Host, settings: Config, tiny_image: str) -> None:
    before = world.look(host)
    for _round in range(5):
        command = [sys.executable, "-m", "hvctl", *CREATE, "raced"]
        racers = [subprocess.Popen(command, env=environment(settings), stderr=subprocess.PIPE) for _racer in range(3)]
        said = [racer.communicate(timeout=60)[1] for racer in racers]
        codes = sorted(racer.returncode for racer in racers)
        assert codes[0] == 0, said
        assert set(codes[1:]) <= {4, 5}, said
        lifecycle.delete(host, "raced")
    assert world.differences(before, world.look(host)) == []


def test_ctrl_c_undoes_a_create(host: Host, settings: Config, tiny_image: str, tmp_path: Path) -> None:
    """A real SIGINT while qemu-img is at work: one that takes its time, found first in PATH."""
    slow = tmp_path / "qemu-img"
    slow.write_text('#!/bin/sh\ntouch "$0.began"\nexec sleep 60\n')
    slow.chmod(0o755)
    before = world.look(host)
    changed = {**environment(settings), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "hvctl", *CREATE, "broken"], env=changed, stderr=subprocess.PIPE, text=True
    )
    deadline_s = time.monotonic() + 30
    while not Path(f"{slow}.began").exists() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _out, err = process.communicate(timeout=30)
    assert (process.returncode, err.splitlines()[-1]) == (130, "hvctl: interrupted")
    assert world.differences(before, world.look(host)) == []


def test_a_slash_at_the_end_of_a_place_is_left_away(here: None, unchanged: None) -> None:
    done = call_here(*CONTAINER, "--mount", "/srv:/data/", "--print-xml")
    assert (done.status, 'target dir="/data"' in done.out) == (0, True), done


def test_a_shared_directory_that_vanished_is_named(host: Host, here: None, tiny_image: str, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    assert call_here(*CREATE, "sharing", "--container", "--mount", f"{shared}:/data").status == 0
    shared.rmdir()
    assert_refused(call_here("start", "sharing"), 8, f"directory '{shared}' that it shares", f"; next: mkdir {shared}")
    lifecycle.delete(host, "sharing")


def test_sizes_are_told_as_they_are_written(host: Host, here: None, tiny_image: str) -> None:
    create.create(host, create.Request(spec=tiny.make_spec("resized"), start=False))
    assert call_here("set", "resized", "--memory", "256M").out == "resized: memory 256MiB, now\n"
    lifecycle.delete(host, "resized")


def test_an_instance_may_be_called_as_an_image_is_where_the_image_is_named(
    host: Host, here: None, tiny_image: str
) -> None:
    assert call_here(*CREATE, "tiny").status == 0
    lifecycle.delete(host, "tiny")


def test_the_definitions_that_would_be_made_are_strings_in_json(here: None, unchanged: None) -> None:
    found = json.loads(call_here(*CREATE, "one", "two", "--print-xml", "--json").out)
    assert [item["name"] for item in found] == ["one", "two"]
    assert [ElementTree.fromstring(item["xml"]).findtext("name") for item in found] == ["one", "two"]


def test_several_names_each_get_their_line(settings: Config, host: Host, tiny_image: str) -> None:
    done = run(settings, "create", "one", "two", "--image", "nosuch", "--no-start")
    assert done.status == 3
    assert sorted(line.split(": there")[0] for line in done.err.splitlines()) == ["hvctl: one", "hvctl: two"]
    done = run(settings, *CREATE, "one", "Two", "three")
    assert done.status == 7
    assert "Two" in done.err
    assert query.find(host, "one") is None  # nothing is begun before all is checked
    done = run(settings, *CREATE, "one", "two", "three")
    assert done.status == 0, done.err
    assert sorted(line.split(":")[0] for line in done.out.splitlines()) == ["one", "three", "two"]
    done = run(settings, "delete", "--yes", "one", "nosuch", "two", "three")
    assert done.status == 3
    assert "nosuch" in done.err
    assert [query.find(host, name) for name in ("one", "two", "three")] == [None] * 3


def test_what_nobody_owns_is_kept_unless_told(host: Host, tiny_image: str) -> None:
    """gc lists what nobody owns, and keeps it unless told."""
    from hvctl import gc

    stray = host.store.layers / "00000000-0000-4000-8000-00000000dead"
    stray.mkdir()
    (stray / "disk.qcow2").write_bytes(b"x" * MIB)
    try:
        kept = gc.collect(host)
        assert [item.is_done for item in kept] == [False]
        assert stray.exists()
    finally:
        gc.collect(host, orphans=True)
    assert not stray.exists()


def test_who_may_not_speak_to_libvirt_is_not_sent_to_set_up_the_host(host: Host, settings: Config) -> None:
    done = run_bytes(settings, "list", as_user=65534)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (8, b"", 1), done.stderr
    assert done.stderr.endswith(b"; next: run it as root, or join the group 'libvirt' and log in again\n")
