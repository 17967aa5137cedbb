"""What is read of application images, and what their init is told: without any guest."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from hvctl.config import Config
from hvctl.errors import HvctlError, InvalidSpec, NotFound
from hvctl.events import ignore
from hvctl.host import Host
from hvctl.hostside import machine
from hvctl.model import Mode, Process, Record, Spec
from hvctl.rootfs import appinitrd, application, oci, sources
from hvctl.rootfs.application import Network, Wishes
from hvctl.rootfs.building import Building
from tests import layouts

CONFIG = {"Env": ["PATH=/bin", "A=b=c"], "Cmd": ["/bin/true"], "User": "app", "WorkingDir": "srv"}


@pytest.fixture
def work(tmp_path: Path) -> Building:
    host = Host(Config(store=tmp_path / "store", run=tmp_path / "run"))
    return Building(host=host, name="app", directory=tmp_path, events=ignore)


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    return layouts.write(tmp_path / "oci", [[layouts.folder("etc")], [layouts.folder("srv")]], CONFIG)


def change(layout: Path, part: str, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit the index, manifest or configuration of a layout; digests follow."""
    index = json.loads((layout / "index.json").read_text())
    if part == "index":
        edit(index)
    else:
        manifest = _take(layout, index["manifests"][0])
        if part == "config":
            config = _take(layout, manifest["config"])
            edit(config)
            manifest["config"] |= layouts.add_blob(layout, json.dumps(config).encode(), manifest["config"]["mediaType"])
        else:
            edit(manifest)
        index["manifests"][0] |= layouts.add_blob(layout, json.dumps(manifest).encode(), manifest["mediaType"])
    (layout / "index.json").write_text(json.dumps(index))


def _take(layout: Path, descriptor: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((layout / "blobs" / descriptor["digest"].replace(":", "/")).read_text())
    return found


def test_a_layout_is_read_as_it_was_written(work: Building, layout: Path) -> None:
    content = oci.read_layout(work, layout)
    assert len(content.layers) == 2
    assert content.process == Process(
        command=("/bin/true",), environment=(("PATH", "/bin"), ("A", "b=c")), user="app", directory="/srv"
    )


@pytest.mark.parametrize(
    ("part", "edit"),
    [
        ("index", lambda data: data["manifests"].clear()),
        ("index", lambda data: data["manifests"].append(data["manifests"][0])),
        ("index", lambda data: data["manifests"][0].update(digest="sha256:../../../../etc/shadow")),
        ("index", lambda data: data["manifests"][0].update(digest="-f")),
        ("index", lambda data: data["manifests"][0].update(digest=None)),
        ("index", lambda data: data["manifests"][0].update(mediaType="text/html")),
        ("index", lambda data: data.pop("manifests")),
        ("manifest", lambda data: data["layers"][0].update(digest="sha256:" + "0" * 63 + "/")),
        ("manifest", lambda data: data["layers"][0].update(mediaType="application/x-sh")),
        ("manifest", lambda data: data["layers"].pop()),
        ("manifest", lambda data: data.update(layers=None)),
        ("manifest", lambda data: data.pop("config")),
        ("config", lambda data: data["rootfs"]["diff_ids"].append("sha256:" + "0" * 64)),
        ("config", lambda data: data["rootfs"].update(diff_ids=["x", "y"])),
        ("config", lambda data: data.update(architecture="arm64")),
        ("config", lambda data: data.update(os="windows")),
        ("config", lambda data: data["config"].update(Env="A=b")),
        ("config", lambda data: data["config"].update(Env=[1])),
        ("config", lambda data: data["config"].update(Cmd=["a\0b"])),
        ("config", lambda data: data["config"].update(User=["root"])),
        ("config", lambda data: data.update(config=[])),
    ],
)
def test_a_layout_that_is_not_as_it_must_be_is_refused(
    work: Building, layout: Path, part: str, edit: Callable[[dict[str, Any]], None]
) -> None:
    change(layout, part, edit)
    try:
        content = oci.read_layout(work, layout)
    except InvalidSpec as refused:
        assert "\n" not in refused.message
    else:
        assert content.process == Process(directory="/")  # an empty list is as good as no configuration


def test_a_blob_of_another_content_is_refused(work: Building, layout: Path) -> None:
    index = json.loads((layout / "index.json").read_text())
    blob = layout / "blobs" / index["manifests"][0]["digest"].replace(":", "/")
    blob.write_bytes(blob.read_bytes().replace(b"gzip", b"zstd"))
    with pytest.raises(InvalidSpec, match="another"):
        oci.read_layout(work, layout)


def test_a_manifest_of_a_size_that_none_has_is_refused(work: Building, layout: Path) -> None:
    (layout / "index.json").write_text(" " * (2 * 1024**2))
    with pytest.raises(HvctlError, match="larger"):
        oci.read_layout(work, layout)


@pytest.mark.parametrize(
    ("wishes", "argv"),
    [
        (Wishes(), ("entry", "cmd")),
        (Wishes(command=("mine", "too")), ("entry", "mine", "too")),
        (Wishes(entrypoint=("other",)), ("other",)),
        (Wishes(entrypoint=(), command=("only",)), ("only",)),
    ],
)
def test_words_of_the_user_replace_the_images(image_process: Any, wishes: Wishes, argv: tuple[str, ...]) -> None:
    process = application.resolve(image_process, wishes)
    assert (*process.entrypoint, *process.command) == argv


@pytest.fixture
def image_process() -> Any:
    from dataclasses import replace

    from hvctl.instances.examples import IMAGE

    process = Process(entrypoint=("entry",), command=("cmd",), environment=(("A", "1"), ("B", "2")))
    return replace(IMAGE, process=process)


def test_the_users_environment_wins(image_process: Any) -> None:
    process = application.resolve(image_process, Wishes(environment=(("B", "x"), ("C", ""))))
    assert dict(process.environment) == {"A": "1", "B": "x", "C": ""}


def test_nothing_to_run_is_refused(image_process: Any) -> None:
    with pytest.raises(InvalidSpec, match="no command"):
        application.resolve(image_process, Wishes(entrypoint=()))


@pytest.mark.parametrize("text", ["$(touch /canary)", "'; reboot; '", "a\nb", '"', "\\", "`id`", "*", ""])
def test_no_word_is_more_than_a_word(text: str) -> None:
    process = Process(entrypoint=(text or "x",), command=(text,), environment=(("K", text),), user="u", directory=text)
    spec = Spec(name="x", mode=Mode.VM, image="i")
    record = Record(uuid=uuid4(), spec=spec, store=Path("/"), image_id="", layers=(), network="", mac="")
    given = application.format_files(record, process, (1, 2), Network())
    find, _, start = given["start"].decode().replace("exit 127", "program=$name").rpartition("\nexec ")
    script = f"{find}\nprintf '%s\\0' {start}"
    shown = subprocess.run(["sh", "-c", script], capture_output=True, check=True, timeout=10)
    words = [text or "x" if word == "$program" else word for word in shlex.split(start)]
    assert (shown.stdout.decode().split("\0")[:-1], words[-2:]) == (words, [text or "x", text])
    script = given["settings"].decode() + 'printf %s "$directory"'
    told = subprocess.run(["sh", "-c", script], capture_output=True, check=True, timeout=10)
    assert told.stdout.decode() == (text or "/")


@pytest.mark.parametrize(
    ("word", "path", "program"),
    [
        ("ls", "none:bin:/bin", "bin/ls"),
        ("ls", "bin/sub::other", "./ls"),
        ("ls", "other:bin", "bin/ls"),
        ("bin/nosuch", "bin", "bin/nosuch"),
        ("sub", "bin", None),
        ("awk", "bin", None),
        ("*", "bin", None),
    ],
)
def test_a_program_is_the_images_own(tmp_path: Path, word: str, path: str, program: str | None) -> None:
    """busybox, which starts it, has an `ls` and an `awk` of its own, too."""
    for name, mode in (("ls", 0o755), ("bin/ls", 0o755), ("other/ls", 0o644), ("bin/sub/x", 0o755)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        (tmp_path / name).chmod(mode)
    spec = Spec(name="x", mode=Mode.VM, image="i")
    record = Record(uuid=uuid4(), spec=spec, store=Path("/"), image_id="", layers=(), network="", mac="")
    process = Process(command=(word,), environment=(("PATH", path),))
    given = application.format_files(record, process, (0, 0), Network())["start"].decode()
    script = given.replace("\nexec ", '\necho "$program"; exit; ')
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=10)
    assert (done.returncode, done.stdout.strip()) == ((0, program) if program else (127, ""))


@pytest.mark.parametrize(
    ("user", "expected"),
    [("", (0, 0)), ("app", (1234, 2345)), ("1234", (1234, 2345)), ("99", (99, 0)), ("app:extra", (1234, 3456)),
     ("7:8", (7, 8)), ("nobody", None), ("app:none", None), ("70000", None), ("-1", None), ("../x", None)],
)  # fmt: skip
def test_users_are_those_of_the_image(
    tmp_path: Path, image_process: Any, user: str, expected: tuple[int, int] | None
) -> None:
    host = Host(Config(store=tmp_path, run=tmp_path))
    tree = tmp_path / "images" / image_process.id / "tree" / "rootfs"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/passwd").write_text(layouts.PASSWD)
    (tree / "etc/group").write_text(layouts.GROUP)
    process = Process(user=user)
    if expected is None:
        with pytest.raises(InvalidSpec, match="image"):
            application.find_ids(host, image_process, process)
    else:
        assert application.find_ids(host, image_process, process) == expected


@pytest.mark.parametrize(
    ("text", "name"),
    [("SIGQUIT", "SIGQUIT"), ("quit", "SIGQUIT"), ("3", "SIGQUIT"), ("0", "SIGTERM"), ("x; id", "SIGTERM")],
)
def test_a_stop_signal_is_a_signal(text: str, name: str) -> None:
    assert application.parse_signal(text) == name


@pytest.mark.parametrize("tag", [":2", ""])
def test_of_a_wrong_tag_the_right_ones_are_named(work: Building, layout: Path, tag: str) -> None:
    def add(index: dict[str, Any]) -> None:
        other = {"org.opencontainers.image.ref.name": "1.0"}
        index["manifests"].append({**index["manifests"][0], "annotations": other})

    change(layout, "index", add)
    work.host.store.building.mkdir(parents=True)
    with pytest.raises(NotFound) as caught:
        oci.acquire(work, sources.Wanted(name="app", source=f"oci:{layout}{tag}"))
    assert caught.value.hint == f"oci:{layout}:TAG with one of its tags: 1.0, latest"


def test_modules_are_loaded_after_what_they_need() -> None:
    lines = [f"drivers/{name.replace('_', '-')}.ko: b.ko a.ko" for name in appinitrd._MODULES]
    order = appinitrd.find_order("\n".join(["a.ko:", "b.ko: a.ko", *lines]))
    assert order[:2] == ["a.ko", "b.ko"]
    assert len(order) == 2 + len(appinitrd._MODULES) == len(set(order))
    with pytest.raises(HvctlError, match="no module"):
        appinitrd.find_order("a.ko:")


def test_the_initrd_is_an_archive() -> None:
    archive = appinitrd.format_archive({"bin/x": (0o100755, b"hello"), "init": (0o100755, b"")})
    listed = subprocess.run(["busybox", "cpio", "-t"], input=archive, capture_output=True, check=True, timeout=10)
    assert listed.stdout.decode().split() == ["bin", "bin/x", "init"]


def test_programs_that_need_a_library_are_not_static() -> None:
    assert machine.is_static(Path("/bin/busybox"))
    assert not machine.is_static(Path("/bin/ls").resolve())
    assert not machine.is_static(Path("/etc/passwd"))


@pytest.mark.parametrize(
    ("source", "name"),
    [("docker://alpine", "alpine"), ("docker://alpine:3.19", "alpine-3.19"), ("docker://alpine:latest", "alpine"),
     ("docker://localhost:5000/team/app", "app"), ("docker://r.example/app@sha256:abc", "app"), ("oci:/tmp/x", "x"),
     ("oci:/tmp/Some Dir:v1", "some-dir-v1"), ("docker-archive:/tmp/app.tar", "app.tar"), ("oci:/", "image")],
)  # fmt: skip
def test_a_source_suggests_a_name(source: str, name: str) -> None:
    assert sources.suggest_name(source) == name
    assert sources.suggest_name(source, is_unique=True).startswith(f"{name}-")
