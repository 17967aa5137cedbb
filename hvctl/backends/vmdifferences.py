"""What `snapshot diff` does with a VM: a confined worker reads both states of its disk, where they do not share it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from hvctl.backends import vmlayers
from hvctl.errors import Unsupported
from hvctl.events import Note, Sink
from hvctl.host import Host
from hvctl.hostside import layers, refusal, sandbox
from hvctl.model import Image, Record
from hvctl.rootfs import confined
from hvctl.values import dataclass

_LIMITS = replace(confined.DEFAULTS, wall_s=1800, cpu_s=1200)


@dataclass(frozen=True)
class _Question:
    """Files, each once, with their formats; the two stacks as numbers of files, topmost first."""

    paths: list[Path]
    formats: list[str]
    stacks: list[list[int]]


def list_differences(
    host: Host, record: Record, image: Image, tops: tuple[str, str], events: Sink
) -> list[tuple[str, str]]:
    """What changed from one layer's stack to another's; only the root's file system is looked at, and only ext4.

    Raises Unsupported for another one, or a damaged one.
    """
    question = _ask(host, image, tops)
    confinement = sandbox.Confinement(
        directory=host.store.image(image.id),
        is_read_only=True,
        read_only=tuple((path, sandbox.place_input(number)) for number, path in enumerate(question.paths)),
        capabilities=sandbox.READ_ANY_OWNER,
        cpu_s=_LIMITS.cpu_s,
        memory_bytes=_LIMITS.memory_bytes,
        file_bytes=0,
    )
    old, new = question.stacks
    words = [json.dumps({"formats": question.formats, "old": old, "new": new})]
    command = sandbox.python_command(confinement, "diskdifferences", words)
    attempt = f"cannot compare the files of {record.name!r}"
    done = confined.wait_for(host, command, attempt, _LIMITS)
    if done.status == refusal.REFUSED:
        reason = done.stderr.strip().splitlines()[-1]
        raise Unsupported(f"{attempt}: {reason}", hint=f"look inside: hvctl start {record.name}")
    if done.status != 0:
        raise confined.explain(done, attempt, _LIMITS)
    answer = json.loads(done.stdout)
    if answer["others"]:
        kinds = ", ".join(answer["others"])
        events(Note(record.name, f"only the root's files are compared; its disk has other file systems, too: {kinds}"))
    return sorted(((kind, path) for kind, path in answer["differences"]), key=lambda item: item[1])


def _ask(host: Host, image: Image, tops: tuple[str, str]) -> _Question:
    store = host.store
    base, format_ = vmlayers.base_of(host, image)
    question = _Question([base], [format_], [])
    numbers: dict[str, int] = {}
    for top in tops:
        stack = []
        for layer in reversed(host.shell.call(layers.list_stack, store.layers, top)):
            if layer not in numbers:
                numbers[layer] = len(question.paths)
                question.paths.append(store.layer_disk(layer))
                question.formats.append("qcow2")
            stack.append(numbers[layer])
        question.stacks.append([*stack, 0])
    return question
