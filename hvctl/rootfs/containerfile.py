"""Images from a Containerfile, by buildah: `FROM` an image of this store, or of a registry.

buildah works in the building's directory alone, in namespaces of its own: whatever ends it takes its mounts and processes
away. RUN is done as root in a chroot (its isolation that needs nothing of the host), where it sees no process and, unless
it is told to, no network but its own loopback: this host's has services that trust whoever is on it. What the file is
FROM is pulled before. The result is read like any OCI image (`oci.py`).

What is FROM an image that is a whole system, and sets no ENTRYPOINT and no CMD, is a whole system again.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

from hvctl.errors import CommandFailed, InvalidSpec, NotFound
from hvctl.events import Sink
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.model import Image, Process
from hvctl.rootfs import building, halves, oci, published
from hvctl.rootfs.building import Building
from hvctl.rootfs.sources import Wanted
from hvctl.units import GIB
from hvctl.values import dataclass

_TIMEOUT_S = 4 * 3600
_LIMIT_BYTES = 1024**2
_LONGEST_REASON = 600
_FROM = re.compile(
    r"^[ \t]*FROM[ \t]+(?:--\S+[ \t]+)*(\S+)(?:[ \t]+AS[ \t]+(\S+))?[ \t]*$", re.IGNORECASE | re.MULTILINE
)
_LOCAL = re.compile(r"(?:localhost/|hvctl/)([a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?)(?::latest)?", re.ASCII)
_STEP = re.compile(r"^(?:\[[0-9]+/[0-9]+\] )?STEP ([0-9]+)/([0-9]+): (.*)")
_NAMESPACES = (
    "--mount",
    "--propagation",
    "private",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
    "--ipc",
    "--uts",
)
_ALONE = ("unshare", "--net", "--", "sh", "-c", 'ip link set lo up; exec "$@"', "sh")
_RESULT = "localhost/hvctl-result"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is to be built."""

    name: str
    """Of the image."""
    file: Path
    context: Path
    """The directory that COPY copies from."""
    has_network: bool = False
    """Whether RUN and ADD are on this host's network."""


def build(host: Host, recipe: Recipe, events: Sink) -> Image:
    """Build an image from a Containerfile, publish it and give it its name.

    Raises NotFound for a file or a local image that is not there, CommandFailed with buildah's last lines when a step
    fails, HostError without buildah or space; nothing stays then.
    """
    text = _read(recipe)
    bases, last, foreign = _find_bases(host, text)
    bases = {reference: halves.ensure_tree(host, image, events) for reference, image in bases.items()}
    with building.begin(host, recipe.name, events, needed_bytes=2 * GIB) as work:
        lines = [line for reference, image in bases.items() for line in _format_base(host, reference, image)]
        layout = work.directory / "built"
        lines += [f"buildah_ pull --quiet -- {shlex.quote(reference)} >/dev/null" for reference in foreign]
        _run(work, [*lines, *_format_build(recipe, layout)], has_network=recipe.has_network)
        work.host.shell.call(files.remove, work.directory / "containers")
        image = oci.acquire(work, Wanted(name=recipe.name, source=f"oci:{layout}:image"))
        work.host.shell.call(files.remove, layout)
        return work.publish(replace(_as_system(image, bases.get(last)), source=f"Containerfile {recipe.file}"))


def _read(recipe: Recipe) -> str:
    for path, is_right in ((recipe.file, recipe.file.is_file()), (recipe.context, recipe.context.is_dir())):
        if not is_right:
            raise NotFound(
                f"there is no {str(path)!r}", hint="hvctl image build -f Containerfile DIRECTORY --name NAME"
            )
    content = files.read_head(recipe.file, limit_bytes=_LIMIT_BYTES + 1)
    if len(content) > _LIMIT_BYTES:
        raise InvalidSpec(f"{str(recipe.file)!r} is longer than a Containerfile", hint="is it another file?")
    return content.decode(errors="replace")


def _find_bases(host: Host, text: str) -> tuple[dict[str, Image], str, list[str]]:
    """The images of this store that a Containerfile is FROM, by what it calls them; what its last stage is; those elsewhere.

    One elsewhere whose name is put together in the file is not among them: buildah pulls it, where it has a network.
    """
    stages: dict[str, str] = {}
    bases, last, foreign = {}, "", []
    for reference, alias in _FROM.findall(text):
        last = stages.get(reference.lower(), reference)
        if alias:
            stages[alias.lower()] = last
        match = _LOCAL.fullmatch(last)
        if match is not None:
            bases[last] = published.get_image(host, match[1])
        elif last != "scratch" and "$" not in last and last not in foreign:
            foreign.append(last)
    if not last:
        raise InvalidSpec("the Containerfile has no FROM", hint="FROM hvctl/debian-12")
    return bases, last, foreign


def _as_system(image: Image, base: Image | None) -> Image:
    """The image as a whole system, if it was made FROM one and runs nothing else."""
    process = image.process
    if base is None or base.process is not None or process is None or process.entrypoint or process.command:
        return image
    return replace(
        image,
        process=None,
        os=base.os,
        version=base.version,
        login_user=base.login_user,
        provision=base.provision,
        packages=base.packages,
    )


def _format_base(host: Host, reference: str, image: Image) -> list[str]:
    """The commands that give buildah an image of this store."""
    name = reference.removesuffix(":latest").replace("/", "-")
    tree = host.store.image_tree(image.id)
    target = reference if reference.startswith("localhost/") else f"localhost/{reference}"
    settings = _format_settings(image.process) if image.process else []
    return [
        f"buildah_ from --name {name} scratch >/dev/null",
        f"tree=$(buildah_ mount {name})",
        f'cp --archive --reflink=auto -- {shlex.quote(str(tree))}/. "$tree/"',
        *([f"buildah_ config {shlex.join(settings)} {name}"] if settings else []),
        f"buildah_ commit --quiet --rm {name} {shlex.quote(target)} >/dev/null",
    ]


def _format_settings(process: Process) -> list[str]:
    words = [f"--env={key}={value}" for key, value in process.environment]
    words += [f"--port={port}" for port in process.ports]
    words += [f"--workingdir={process.directory}", f"--stop-signal={process.stop_signal}"]
    words += [f"--user={process.user}"] if process.user else []
    words += [f"--entrypoint={json.dumps(process.entrypoint)}"] if process.entrypoint else []
    return words + ([f"--cmd={shlex.join(process.command)}"] if process.command else [])


def _format_build(recipe: Recipe, layout: Path) -> list[str]:
    build = ["--isolation=chroot", "--layers=false", "--format=oci", f"--tag={_RESULT}", f"--file={recipe.file}"]
    push = ["--quiet", "--disable-compression", _RESULT, f"oci:{layout}:image"]
    return [
        *([] if recipe.has_network else ["inside=alone"]),
        f"buildah_ build {shlex.join([*build, str(recipe.context)])}",
        "inside=env",
        f"buildah_ push {shlex.join(push)}",
    ]


def _run(work: Building, lines: list[str], *, has_network: bool) -> None:
    """Do all of it in the same namespaces. overlayfs where the store can hold one, else copies."""
    here = shlex.quote(str(work.directory))
    script = "\n".join(
        [
            "set -eu",
            "exec 1>&2",  # buildah tells its steps on stdout
            f"export TMPDIR={here} XDG_RUNTIME_DIR={here}",
            f'inside=env; alone() {{ {shlex.join(_ALONE)} "$@"; }}',
            f'storage() {{ $inside buildah --root {here}/containers --runroot {here}/run --storage-driver "$@"; }}',
            "driver=overlay; storage overlay info >/dev/null 2>&1 || driver=vfs",
            'buildah_() { storage "$driver" "$@"; }',
            *lines,
        ]
    )
    shown: list[str] = []

    def on_line(line: str) -> None:
        shown.append(line)
        match = _STEP.match(line)
        if match is not None:
            work.tell(f"step {match[1]}: {match[3][:60]}", 20 + 50 * (int(match[1]) - 1) / max(int(match[2]), 1))

    work.tell("preparing", 2)
    words = ["unshare", *_NAMESPACES, "--", "sh", "-c", script]
    done = work.host.shell.run(words, timeout_s=_TIMEOUT_S, check=False, on_line=on_line)
    if done.status != 0:
        step = next((line for line in reversed(shown) if _STEP.match(line)), "before its first step")
        lines = [line for line in shown if line.strip() and not _STEP.match(line)]
        hint = "see all of it: hvctl image build -v ..."
        if "no space left" in done.stderr.lower():
            hint = "free some space: hvctl image list; hvctl gc"
        elif "buildah: not found" in done.stderr:
            hint = "install it: apt-get install buildah"
        elif not has_network and (match := _STEP.match(step)) and match[3].startswith("RUN"):
            hint = "does it want the network? hvctl image build --network host ...; see all of it with -v"
        raise CommandFailed(
            f"building {work.name!r} failed at {step[:200]!r}: {_shorten('; '.join(lines[-3:]))}",
            hint=hint,
            status=done.status,
            stderr=done.stderr,
        )


def _shorten(text: str) -> str:
    """Both ends: Go's errors have the cause last."""
    return (
        text if len(text) <= _LONGEST_REASON else f"{text[: _LONGEST_REASON // 3]} ... {text[-_LONGEST_REASON // 2 :]}"
    )
