"""A disk as a raw file in a building's directory, looked at and changed by confined programs only.

Partitions and file systems are read by `hostside/diskreader.py`; e2fsck mends, debugfs removes. Nothing of it is ever
mounted here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hvctl.errors import HostError, InvalidSpec
from hvctl.events import Note, Progress
from hvctl.hostside import files, identityfiles, partitions, sandbox
from hvctl.hostside.partitions import Part
from hvctl.rootfs import confined
from hvctl.rootfs.building import Building
from hvctl.shell import Completed
from hvctl.units import GIB
from hvctl.values import dataclass

NAME = "disk.raw"
_COMMANDS, _EMPTY = "debugfs.commands", "empty"
_E2FSCK_MENDED = (0, 1)
# What debugfs takes as one word without quoting.
_PLAIN = re.compile(r"[A-Za-z0-9._@+~:=,/-]+", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class RawDisk:
    """The disk of an image in the making. Raises InvalidSpec for what is damaged or refused, HostError without space."""

    work: Building
    subject: str
    """What is read, for messages: `image web`, `instance web`."""
    virtual_bytes: int

    @property
    def limits(self) -> confined.Limits:
        return replace(confined.DEFAULTS, file_bytes=self.virtual_bytes + GIB)

    @property
    def path(self) -> Path:
        return self.work.directory / NAME

    def find_root(self) -> tuple[Part | None, list[Part]]:
        """The part with the Linux root, its journal replayed, and all parts."""
        parts = self._survey()
        waiting = [part for part in parts if part.needs_recovery]
        for part in waiting:
            if self.run("e2fsck", "-fy", f"{NAME}?offset={part.offset}", check=False).status not in _E2FSCK_MENDED:
                note = f"e2fsck could not mend the file system at {part.offset} of its disk"
                self.work.events(Note(self.work.name, note))
        parts = self._survey() if waiting else parts
        return partitions.choose_root(parts), parts

    def pack(self, root: Part, archive: str) -> None:
        """Write a root as a tar archive into the building's directory."""
        self._read("pack", NAME, str(root.offset), str(root.size), archive)

    def pack_changes(self, root: Part, tree: Path, archive: str, left_out: Sequence[str] = ()) -> list[str]:
        """Write what of a root a tree does not have as a tar archive; which names of the tree are gone.

        `left_out`: paths that are not looked at.
        """
        words = (NAME, str(root.offset), str(root.size), sandbox.place_input(0), archive, *left_out)
        answer = self._read(*words, module="diskchanges", read_only=[tree])
        return list(answer["gone"])

    def remove_identity(self, root: Part) -> None:
        """Take out of a root what is one system's own."""
        answer = self._read("identity", NAME, str(root.offset), str(root.size))
        lines = [f"{'rmdir' if is_folder else 'rm'} /{path}" for path, is_folder in answer["paths"] if _is_plain(path)]
        folder, _slash, name = identityfiles.MACHINE_ID.rpartition("/")
        if answer["has_machine_id"]:
            self.work.host.shell.call(files.write_file, self.work.directory / _EMPTY, b"", 0o444)
            lines += [f"rm /{identityfiles.MACHINE_ID}", f"cd /{folder}", f"write {_EMPTY} {name}"]
        self.edit(lines, offset=root.offset)

    def trim(self) -> None:
        """Make holes of what its ext4 file systems do not use: what was deleted is in the image no more, keys above all."""
        for part in self._survey():
            if part.kind != "ext4" or part.problem:
                continue
            words = ("e2fsck", "-fy", "-E", "discard", f"{NAME}?offset={part.offset}")
            if self.run(*words, check=False).status not in _E2FSCK_MENDED:
                note = f"what was deleted stays readable in the file system at {part.offset} of its disk: e2fsck failed"
                self.work.events(Note(self.work.name, note))

    def edit(
        self, lines: Sequence[str], *, offset: int = 0, read_only: Sequence[Path] = (), accepted: str = "nothing"
    ) -> None:
        """Let debugfs do this in the ext4 file system at an offset, and e2fsck look at what came of it.

        `accepted`: what it may complain of. Its status says nothing. Raises HostError.
        """
        content = "".join(f"{line}\n" for line in lines).encode()
        self.work.host.shell.call(files.write_file, self.work.directory / _COMMANDS, content, 0o600)
        place = f"{NAME}?offset={offset}"
        done = self.run("debugfs", "-w", "-f", _COMMANDS, place, read_only=read_only)
        complaints = [
            line
            for line in done.stderr.splitlines()
            if line.strip() and not line.startswith("debugfs ") and accepted not in line
        ]
        check = self.run("e2fsck", "-fn", place, check=False)
        if complaints or check.status != 0:
            reason = complaints[0] if complaints else f"e2fsck ended with {check.status}"
            raise HostError(
                f"cannot change the file system of {self.subject!r}: {reason[:200]}",
                hint="is there space? hvctl host doctor",
            )

    def convert(self, target: Path) -> None:
        """Make a qcow2 file of it, and remove it."""
        words = ("qemu-img", "convert", "-p", "-f", "raw", "-O", "qcow2", "--", sandbox.place_input(0), "disk.qcow2")
        self.run(*words, read_only=[self.path], task="making the disk")
        self.work.host.shell.call(files.remove, self.path)
        self.work.host.shell.call(files.replace_if_there, self.work.directory / "disk.qcow2", target)

    def run(self, *words: str, read_only: Sequence[Path] = (), check: bool = True, task: str = "") -> Completed:
        """Run a program that sees the building's directory, and `read_only` with whatever owners.

        `task`: what `qemu-img -p` is at, of all bytes of the disk.
        """

        def tell(share: float) -> None:
            done_bytes = int(share * self.virtual_bytes)
            self.work.events(Progress(self.work.name, task, done_bytes, self.virtual_bytes, is_bytes=True))

        return confined.run_confined(
            self.work.host,
            self.work.directory,
            words,
            read_only=read_only,
            capabilities=sandbox.READ_ANY_OWNER if read_only else (),
            limits=self.limits,
            check=check,
            tell=tell,
        )

    def _survey(self) -> list[Part]:
        found = self._read("survey", NAME)
        return [Part(**part) for part in found]

    def _read(self, *arguments: str, module: str = "diskreader", read_only: Sequence[Path] = ()) -> Any:
        """What the worker says."""
        limits = self.limits
        confinement = sandbox.Confinement(
            directory=self.work.directory,
            read_only=tuple((path, sandbox.place_input(number)) for number, path in enumerate(read_only)),
            capabilities=sandbox.READ_ANY_OWNER if read_only else (),
            cpu_s=limits.cpu_s,
            memory_bytes=limits.memory_bytes,
            file_bytes=limits.file_bytes,
        )
        words = sandbox.python_command(confinement, module, arguments)
        done = self.work.host.shell.run(words, timeout_s=limits.wall_s, check=False)
        if done.status != 0:
            raise confined.explain(done, f"cannot read the disk of {self.subject!r}", limits)
        try:
            return json.loads(done.stdout) if done.stdout else None
        except ValueError as error:
            raise InvalidSpec(f"the disk of {self.subject!r} cannot be read", hint="get it again") from error


def _is_plain(path: str) -> bool:
    return _PLAIN.fullmatch(path) is not None
