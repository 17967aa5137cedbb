"""What an image from elsewhere may say of itself: a white list, each value by its pattern, everything else left out.

A description becomes part of definitions, command lines and messages; so it is rebuilt, never taken as it came.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from hvctl.model import Artefact, Image, Process
from hvctl.rootfs import manifest

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~:-]{0,63}", re.ASCII)
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}", re.ASCII)
_ARGUMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=:/,+-]{0,199}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", re.ASCII)
# What a kernel runs, or reads its system from, is not somebody else's to say.
_REFUSED_ARGUMENTS = ("init", "rdinit", "systemd.unit", "systemd.run", "rd.break", "systemd.debug-shell")
_FORMATS = ("qcow2", "raw")
_LARGEST_BYTES = 16 * 1024**4
_MOST_WORDS, _LONGEST_WORD = 4096, 128 * 1024


def parse_image(data: dict[str, Any]) -> Image:
    """The image that a foreign manifest describes. Raises KeyError, TypeError or ValueError with the reason."""
    if int(data["schema"]) > manifest.SCHEMA:
        raise ValueError("it was made by a newer hvctl")
    image = manifest.from_dict(data)
    _check(_WORD, image.os, image.version, *image.packages, *([image.kernel_release] if image.kernel_release else []))
    _check(_USER, image.login_user)
    _check(_TIME, image.created_at)
    _check(_ARGUMENT, *image.kernel_arguments)
    if image.architecture != "x86_64":
        raise ValueError(f"it is for {image.architecture[:20]!r}, not for x86_64")
    if any(word.partition("=")[0] in _REFUSED_ARGUMENTS for word in image.kernel_arguments):
        raise ValueError("its kernel arguments name a program to run")
    if image.tree_digest:
        _check(_DIGEST, image.tree_digest.removeprefix("sha256:"))
    if (image.kernel is None) != (image.initrd is None) or (image.kernel is not None and image.disk is None):
        raise ValueError("it has a kernel without what belongs to it")
    if image.disk is None and not image.has_tree:
        raise ValueError("it has neither a disk nor a tree")
    if image.disk is not None and image.disk.format not in _FORMATS:
        raise ValueError("its disk has a format that cannot be")
    if image.disk is not None and not 0 < image.disk.virtual_bytes <= _LARGEST_BYTES:
        raise ValueError("its disk has a size that cannot be")
    if image.process is not None:
        _check_process(image.process)
    # Where it came from is what others are compared with: nobody else's to say.
    return replace(image, source="", origin="")


def parse_member(file: object, data: dict[str, Any]) -> Artefact:
    """Name, size and digest of a file, checked. Raises as `parse_image`."""
    member = manifest.parse_artefact({"file": file, **data})
    _check(_DIGEST, member.sha256)
    if not 0 <= member.size_bytes <= _LARGEST_BYTES:
        raise ValueError(f"the size of {member.file!r} cannot be")
    return member


def _check(pattern: re.Pattern[str], *words: str) -> None:
    for word in words:
        if not pattern.fullmatch(word):
            raise ValueError(f"{word[:60]!r} cannot be")


def _check_process(process: Process) -> None:
    """It may be any program of the image's own; but nothing that could end a word or a line elsewhere."""
    pairs: Iterable[str] = (word for pair in process.environment for word in pair)
    words = [*process.entrypoint, *process.command, *pairs, process.user, process.directory, process.stop_signal]
    if len(words) > _MOST_WORDS or any("\0" in word or len(word) > _LONGEST_WORD for word in words):
        raise ValueError("its process cannot be")
    if any("=" in name or not name for name, _value in process.environment):
        raise ValueError("its environment cannot be")
    for port in process.ports:
        _check(re.compile(r"[0-9]{1,5}/(tcp|udp|sctp)"), port)
