"""Progress on a terminal: one line a subject, a bar where the total is known, gone when the work is done."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from hvctl.cli.plain import plain
from hvctl.events import Event, Note, Progress, Sink, Stage, StepStarted
from hvctl.units import format_duration, format_size


class _Rate(ProgressColumn):
    """Of bytes: how many there are, how fast they come, and how long it will take; nothing for other units."""

    def render(self, task: Task) -> Text:
        if not task.fields.get("is_bytes"):
            return Text()
        words = [format_size(int(task.completed))]
        if task.total:
            words[0] += f" of {format_size(int(task.total))}"
        if task.speed:
            words.append(f"{format_size(int(task.speed))}/s")
        if task.time_remaining:
            words.append(f"{format_duration(task.time_remaining)} left")
        return Text(", ".join(words))


@contextlib.contextmanager
def watch() -> Iterator[Sink]:
    """A sink that draws on stderr until the block ends."""
    console = Console(file=sys.stderr, highlight=False)
    bars = Bars(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TaskProgressColumn(),  # empty while the total is unknown
        TimeElapsedColumn(),
        _Rate(),
        console=console,
        transient=True,
    )
    tasks: dict[str, TaskID] = {}

    def show(subject: str, text: str, done: float | None, total: float | None, *, is_bytes: bool = False) -> None:
        description = f"{subject}: {text}" if subject else text
        if subject not in tasks:
            tasks[subject] = bars.add_task(description, total=total, is_bytes=is_bytes)
        task = bars.tasks[bars.task_ids.index(tasks[subject])]
        if task.description != description:  # another task has another rate
            bars.reset(tasks[subject], start=True)
        bars.update(tasks[subject], description=description, total=total, completed=done or 0, is_bytes=is_bytes)

    def sink(event: Event) -> None:
        match event:
            case Note(subject, text):
                console.print(plain(f"{subject}: {text}" if subject else text), markup=False, soft_wrap=True)
            case Progress(subject, task, done, total, is_bytes):
                show(subject, task, done, total or None, is_bytes=is_bytes)
            case Stage(subject, name):
                show(subject, f"waiting for {name}", None, None)
            case StepStarted(subject, verb, step):
                show(subject, f"{verb}: {step}", None, None)

    with bars:
        yield sink
