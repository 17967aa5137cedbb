"""What a shell is: run a program, call a function of `hvctl.hostside`, on whichever machine it stands for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from os import PathLike
from typing import ParamSpec, TypeVar

from hvctl.values import dataclass

P = ParamSpec("P")
R = TypeVar("R")

Argument = str | PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Completed:
    """A program that ended: its status and everything it wrote."""

    argv: tuple[str, ...]
    status: int
    stdout: bytes
    stderr: str

    @property
    def text(self) -> str:
        """stdout as text, undecodable bytes replaced."""
        return self.stdout.decode(errors="replace")


class Shell(ABC):
    """One machine on which programs run and files change."""

    @abstractmethod
    def run(
        self,
        argv: Sequence[Argument],
        *,
        timeout_s: float,
        stdin: bytes = b"",
        check: bool = True,
        on_line: Callable[[str], None] | None = None,
    ) -> Completed:
        """Run a program to its end, never through a command line.

        `on_line` gets each line of stderr as it comes; what it raises ends the program. Raises HostError when the
        program is missing, CommandFailed when it ends with another status than 0 (unless `check` is off), TimedOut
        after `timeout_s`; then it and all that it started are killed. Locks held by this process are held by the
        program too, until it ends.
        """

    @abstractmethod
    def call(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function of `hvctl.hostside` on that machine.

        Arguments and result are plain values (str, Path, int, bytes, lists of them), so that they can travel.
        OSError comes back as HostError with path and reason; a full disk says so.
        """
