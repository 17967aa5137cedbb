"""What a long verb reports while it works, so that a progress bar, a JSON stream or a test can watch it."""

from __future__ import annotations

from collections.abc import Callable

from hvctl.values import dataclass


@dataclass(frozen=True)
class Note:
    """One line that the user should read: `accelerator tcg: kvm is there but unusable: ...`."""

    subject: str
    text: str


@dataclass(frozen=True)
class Progress:
    """How far a task is: `done` of `total` in the unit of its choice; total 0 when unknown."""

    subject: str
    task: str
    done: float
    total: float
    is_bytes: bool = False
    """Whether the unit is a byte, so that a rate says something."""


@dataclass(frozen=True)
class Stage:
    """A stage of waiting has begun: `boot`, `network`, `ssh`."""

    subject: str
    name: str


@dataclass(frozen=True)
class StepStarted:
    """A step of an operation is about to be done; its intent is already recorded."""

    subject: str
    verb: str
    step: str


Event = Note | Progress | Stage | StepStarted
Sink = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The sink of a caller that does not watch."""
