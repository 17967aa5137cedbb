"""Progress on a terminal: one line a subject, a bar where the total is known, gone when the work is done."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from hvctl.events import Event, Note, Progress, Sink, Stage, StepStarted


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
        console=console,
        transient=True,
    )
    tasks: dict[str, TaskID] = {}

    def show(subject: str, text: str, done: float | None, total: float | None) -> None:
        description = f"{subject}: {text}" if subject else text
        if subject not in tasks:
            tasks[subject] = bars.add_task(description, total=total)
        bars.update(tasks[subject], description=description, total=total, completed=done or 0)

    def sink(event: Event) -> None:
        match event:
            case Note(subject, text):
                console.print(f"{subject}: {text}" if subject else text, markup=False, soft_wrap=True)
            case Progress(subject, task, done, total):
                show(subject, task, done, total or None)
            case Stage(subject, name):
                show(subject, f"waiting for {name}", None, None)
            case StepStarted(subject, verb, step):
                show(subject, f"{verb}: {step}", None, None)

    with bars:
        yield sink
