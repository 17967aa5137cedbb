"""Application images: pulled from a registry, run in both modes, kept as services."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import signal
import stat
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvctl import gc, images
from hvctl.backends import processes
from hvctl.config import Config
from hvctl.errors import HvctlError, InvalidSpec, NotFound
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.instances import change, lifecycle, query
from hvctl.libvirtapi import networks
from hvctl.model import Mode, Provision, State
from hvctl.rootfs import halves
from tests import cli, layouts, registry, world
from tests.registry import Registry

pytestmark = pytest.mark.guest

CONFIG = {
    "Env": ["PATH=/bin", "GREETING=hello world", "QUOTE='\"$x"],
    "User": "app",
    "WorkingDir": "/srv/work",
    "Entrypoint": ["/bin/sh", "-c"],
    "Cmd": ["echo the image's own command"],
    "StopSignal": "SIGUSR1",
    "ExposedPorts": {"80/tcp": {}},
}

# Everything of a tree but what an instance gets from hvctl: one line for each name.
LIST = r"""
cd /; find . -xdev | grep -vE '^\.$|^\./(dev|proc|sys|lost\+found)($|/)|^\./(etc/(hosts|hostname|resolv.conf)|srv/work)$' | sort |
while read -r path; do
    [ -L "$path" ] && { echo "$path link $(readlink "$path") $(stat -c '%u %g' "$path")"; continue; }
    [ -d "$path" ] && { echo "$path folder $(stat -c '%a %u %g' "$path")"; continue; }
    echo "$path file $(stat -c '%a %u %g %h' "$path") $(sha256sum <"$path" | cut -d' ' -f1)"
done
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with registry.serving(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers with whiteouts, an opaque directory, hard links and attributes."""
    layers = [layouts.base(), *layouts.changes()]
    return layouts.write(tmp_path_factory.mktemp("layout") / "app", layers, CONFIG)


@pytest.fixture(scope="module")
def source(server: Registry, layout: Path) -> str:
    return server.push(layout, "team/app:1")


@pytest.fixture(scope="module")
def app(host: Host, source: str, debian_image: str) -> str:
    """The name of the image, pulled."""
    image = images.bring(host, images.Wanted(name="app", source=source))
    return halves.ensure_disk(host, image).name


@pytest.fixture
def ran(host: Host) -> Iterator[None]:
    """Afterwards everything is as it was before."""
    before = world.look(host)
    yield
    assert world.differences(before, world.look(host)) == []


def words(mode: Mode, *rest: str) -> list[str]:
    return ["run", f"--{mode}", "--memory", "256MiB", *rest]


def test_an_image_says_what_it_is(host: Host, app: str, source: str) -> None:
    image = images.get(host, app).image
    assert image is not None and image.process is not None
    assert (image.provision, image.source) == (Provision.PROCESS, source)
    assert (image.process.user, image.process.directory, image.process.ports) == ("app", "/srv/work", ("80/tcp",))
    assert image.process.stop_signal == "SIGUSR1"


def test_the_same_content_is_one_image_wherever_it_comes_from(host: Host, app: str, layout: Path) -> None:
    again = images.bring(host, images.Wanted(name="again", source=f"oci:{layout}:latest"))
    first = images.get(host, app).image
    assert first is not None
    assert again.id == first.id


def test_archives_are_taken_as_well(host: Host, app: str, layout: Path, tmp_path: Path) -> None:
    first = images.get(host, app).image
    for kind in ("oci-archive", "docker-archive"):
        archive = tmp_path / f"{kind}.tar"
        target = f"{kind}:{archive}:{'x:1' if kind == 'docker-archive' else 'x'}"
        command = ["skopeo", "copy", "--quiet", "--insecure-policy", f"oci:{layout}:latest", target]
        subprocess.run(command, check=True, timeout=60, capture_output=True)
        wanted = images.Wanted(name="again", source=f"{kind}:{archive}", sha256=files.hash_file(archive))
        brought = images.bring(host, wanted)
        assert first is not None
        assert brought.process == first.process
        if kind == "oci-archive":
            assert brought.id == first.id
        with pytest.raises(InvalidSpec, match="another checksum"):
            images.bring(host, images.Wanted(name="again", source=f"{kind}:{archive}", sha256="0" * 64))


def test_it_runs_as_its_image_says(settings: Config, ran: None, app: str, mode: Mode) -> None:
    script = """
        echo "$(id -u):$(id -g):$(id -G) $(pwd) $HOME $GREETING $EXTRA $QUOTE"; echo to-stderr >&2; cat
        for each in 1 2 3; do (sleep 0.1 &); done; sleep 0.2
        while cat /proc/[0-9]*/stat 2>/dev/null | grep -q ') Z '; do sleep 0.1; done; echo reaped >/dev/stdout
        cat /etc/hostname; ip -4 addr show eth0 | grep -c inet; exit 7"""
    done = cli.run(settings, *words(mode, "--name", "app-1", "-e", "EXTRA=a b", app, "--", script), stdin="one\ntwo\n")
    assert done.out.splitlines() == [
        "1234:2345:2345 3456 /srv/work /home/app hello world a b '\"$x",
        *("one", "two", "reaped", "app-1", "1"),
    ]
    assert (done.status, done.err) == (7, "to-stderr\n")


@pytest.mark.only_mode(Mode.CONTAINER, "a VM has nobody who could give it a terminal")
@pytest.mark.parametrize("option", ["-it", ""])
def test_it_has_a_terminal_where_there_is_one(settings: Config, ran: None, app: str, mode: Mode, option: str) -> None:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 33, 101, 0, 0))
    script = "hv=/dev/hvctl/busybox; $hv tty; $hv stty size; read line; echo $line $TERM $(id -u) $(pwd) >/dev/stdout; exit 7"
    options = [option] if option else []
    process = subprocess.Popen(
        [sys.executable, "-m", "hvctl", *words(mode, *options, app, "--", script)],
        env={**cli.environment(settings), "TERM": "dumb"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.write(ours, b"a line\n")
    assert process.wait(timeout=60) == 7
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # EIO: the end
        while data := os.read(ours, 4096):
            said += data
    os.close(ours)
    for words_said in (b"/dev/pts/", b"33 101", b"a line dumb 1234 /srv/work"):
        assert words_said in said


def test_a_vm_has_no_terminal_and_says_so(settings: Config, ran: None, app: str) -> None:
    refused = cli.run(settings, *words(Mode.VM, "-t", app, "--", "true"))
    assert refused.status == 255
    assert "a VM has no terminal for a command" in refused.err


@pytest.mark.long_in(Mode.VM)
def test_its_tree_is_that_which_umoci_makes(
    settings: Config, ran: None, app: str, mode: Mode, layout: Path, tmp_path: Path
) -> None:
    subprocess.run(["umoci", "unpack", "--image", f"{layout}:latest", tmp_path / "b"], check=True, timeout=60)
    expected = sorted(list_tree(tmp_path / "b" / "rootfs"))
    done = cli.run(settings, *words(mode, "--user", "0:0", app, "--", LIST))
    assert sorted(done.out.splitlines()) == expected


def list_tree(root: Path) -> Iterator[str]:
    """What LIST prints, of a directory here."""
    for path in root.rglob("*"):
        name = f"./{path.relative_to(root)}"
        if re.match(r"\./(dev|proc|sys)($|/)", name):
            continue
        facts = path.lstat()
        owner = f"{facts.st_uid} {facts.st_gid}"
        if path.is_symlink():
            yield f"{name} link {os.readlink(path)} {owner}"
        elif path.is_dir():
            yield f"{name} folder {stat.S_IMODE(facts.st_mode):o} {owner}"
        else:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            yield f"{name} file {stat.S_IMODE(facts.st_mode):o} {owner} {facts.st_nlink} {digest}"


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)], ids=["TERM", "INT"]
)
def test_a_signal_asks_it_to_end_as_its_image_wants(
    settings: Config, ran: None, app: str, mode: Mode, number: int
) -> None:
    script = "trap 'echo asked; exit 5' USR1; echo up; while :; do sleep 0.1; done"
    argv = [sys.executable, "-m", "hvctl", *words(mode, app, "--", script)]
    with subprocess.Popen(argv, env=cli.environment(settings), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(number)
        assert process.stdout.read() == b"asked\n"
        assert process.wait(cli.TIMEOUT_S) == 5


def test_a_killed_run_leaves_nothing_after_gc(host: Host, settings: Config, ran: None, app: str) -> None:
    argv = [sys.executable, "-m", "hvctl", *words(Mode.CONTAINER, "--name", "killed", app, "--", "echo up; sleep 1000")]
    with subprocess.Popen(argv, env=cli.environment(settings), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert [item for item in gc.collect(host) if "killed" in item.what] == []  # it lives
        process.kill()
    assert query.get(host, "killed").state is State.RUNNING
    found = gc.collect(host)
    assert [item.is_done for item in found if "killed" in item.what] == [True]


def test_much_output_neither_stops_nor_is_lost(settings: Config, ran: None, app: str) -> None:
    done = cli.run_bytes(settings, *words(Mode.CONTAINER, app, "--", "head -c 100000000 /dev/zero; exit 3"))
    assert (done.returncode, len(done.stdout)) == (3, 100_000_000)


def test_a_service_is_kept_and_its_log_bounded(host: Host, settings: Config, ran: None, app: str, mode: Mode) -> None:
    script = "trap 'echo told; exit 5' USR1; echo first; head -c 20000000 /dev/zero; echo; echo up; while :; do sleep 0.1; done"
    arguments = ["--image", app, *(["--container"] if mode is Mode.CONTAINER else []), "--memory", "256MiB"]
    made = cli.run(settings, "create", "service", *arguments, "--env", "X=1", "--", script)
    assert (made.status, made.out.split(";")[1].strip()) == (0, "next: hvctl logs service"), made.err
    instance = query.get(host, "service")
    cli.wait_for(lambda: query.read_console(host, instance, lines=1) == ("up",), cli.TIMEOUT_S)
    assert query.read_console(host, instance, lines=1) == ("up",)
    kept = files.disk_usage(host.store.output(instance.record.uuid))
    assert kept < 17_000_000
    done = cli.run(settings, "exec", "service", "--", "id", "-u")
    refused = (255, "guest agent") if mode is Mode.VM else (0, "")
    assert (done.status, refused[1] in done.err) == (refused[0], True)
    assert "no sshd" in cli.run(settings, "ssh", "service").err
    found = cli.run(settings, *words(Mode.CONTAINER, app, "--", "nslookup service"))
    assert instance.record.address in found.out, found  # it asks for no lease, and has a name all the same
    assert cli.run(settings, "stop", "service").status == 0
    assert query.read_console(host, instance, lines=1) == ("told",)
    assert processes.read_status(host, instance.record).exit_code == 5
    lifecycle.start(host, "service")
    assert processes.read_status(host, instance.record).exit_code is None
    lifecycle.stop(host, "service", force=True)
    change.rename(host, "service", "renamed")
    connection = host.connection(mode)
    assert "<hostname>renamed</hostname>" in networks.read_definition(connection, settings.network)
    lifecycle.delete(host, "renamed")
    assert "hostname" not in networks.read_definition(connection, settings.network)


@pytest.mark.parametrize(
    ("program", "code"), [("/bin/nosuch", 127), ("nosuch", 127), ("/etc/passwd", 126), ("/bin/test", 1)]
)
def test_one_that_fails_at_once_says_so_each_time(
    host: Host, settings: Config, ran: None, app: str, program: str, code: int
) -> None:
    arguments = ["--container", "--memory", "256MiB", "--image", app, "--entrypoint", program]
    for command in (["create", "broken", *arguments], *[["start", "broken"]] * 4):
        done = cli.run(settings, *command)
        if program == "/bin/test" and done.status == 0:  # it ran, for longer than init looks at one that has just begun
            cli.wait_for(lambda: query.get(host, "broken").state is State.STOPPED)
            assert f"stopped (exit code {code})" in cli.run(settings, "show", "broken").out
        else:
            assert (done.status, re.findall(r"with code (\d+)", done.err)) == (12, [str(code)]), done
    lifecycle.delete(host, "broken")


def test_one_that_has_ended_tells_its_code(host: Host, settings: Config, ran: None, app: str, mode: Mode) -> None:
    arguments = ["--image", app, *(["--container"] if mode is Mode.CONTAINER else []), "--memory", "256MiB"]
    made = cli.run(settings, "create", "broken", *arguments, "--entrypoint", "/bin/nosuch")
    assert (made.status, "with code 127" in made.err) == (12, True)
    cli.wait_for(lambda: query.get(host, "broken").state is State.STOPPED)
    assert "stopped (exit code 127)" in cli.run(settings, "show", "broken").out
    shown = json.loads(cli.run(settings, "show", "broken", "--json").out)
    listed = json.loads(cli.run(settings, "list", "--json").out)
    assert [item["exit_code"] for item in (shown, *listed) if item["name"] == "broken"] == [127, 127]
    lifecycle.delete(host, "broken")


@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        (["nosuch"], 255, "no image 'nosuch'"),
        (["docker://localhost:1/none"], 255, "cannot pull"),
        (["--entrypoint", "", "app"], 255, "names no command"),
        (["--name", "../up", "app"], 255, "../up"),
        (["--env", "=x", "app"], 255, "K=V"),
        (["debian-12"], 255, "whole system"),
        (["--env", "A=b", "debian-12", "--", "true"], 255, "whole system"),
        ([], 255, "IMAGE"),
    ],
)
def test_what_cannot_be_run_says_why(
    settings: Config, ran: None, app: str, options: list[str], status: int, reason: str
) -> None:
    done = cli.run(settings, "run", *options)
    assert (done.status, done.err.count("\n")) == (status, 1)
    assert reason in done.err


def test_a_template_of_another_kind_is_refused(host: Host, settings: Config, ran: None, app: str) -> None:
    for image, template in ((app, "default"), ("debian-12", "application")):
        done = cli.run(settings, "create", "odd", "--container", "--image", image, "--template", template)
        assert (done.status, done.err.count("\n")) == (7, 1)
        assert "is for a" in done.err


def test_a_source_is_pulled_once(host: Host, settings: Config, layout: Path) -> None:
    source = f"oci:{layout}:latest"
    first = images.get_or_bring(host, source)
    for again in (images.get_or_bring(host, source), images.get_or_bring(host, first.name)):
        assert (again.name, again.id) == (first.name, first.id)
    images.delete(host, first.name)


def test_a_whole_system_runs_one_command(settings: Config, ran: None, debian_image: str) -> None:
    done = cli.run(settings, "run", "--container", debian_image, "--", "sh", "-c", "echo out; exit 4")
    assert (done.status, done.out) == (4, "out\n")


def test_a_flipped_byte_in_the_registry_is_refused(host: Host, server: Registry, layout: Path, ran: None) -> None:
    source = server.push(layout, "team/flipped:1")
    blob = server.list_blobs()[0]
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    original = blob.read_bytes()
    blob.write_bytes(content)
    try:
        with pytest.raises(HvctlError, match="igest") as refused:
            images.bring(host, images.Wanted(name="flipped", source=source))
    finally:
        blob.write_bytes(original)
    assert "\n" not in refused.value.message


def test_what_is_not_there_is_not_found(host: Host, server: Registry, ran: None) -> None:
    with pytest.raises(NotFound):
        images.bring(host, images.Wanted(name="none", source=f"docker://{server.address}/team/none:1"))
    with pytest.raises(NotFound):
        images.bring(host, images.Wanted(name="none", source="oci:/nonexistent:latest"))
