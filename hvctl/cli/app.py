"""What every command shares: the host, the output, work on several names.

A command module looks like this; it parses, calls one library function, prints:

    @click.command()
    @click.argument("name")
    @output_options                      # adds --json and -v; the first parameter is the App
    def show(app: App, name: str) -> None:
        '''Show one instance.

        Example: hvctl show web
        '''
        instance = query.get(app.host, name)
        app.print_result(as_json(instance), lambda: app.print_pairs(rows_of(instance)))

Long work gets a sink from `with app.progress() as events:`. Work on several names goes through `app.for_each`.
Register the command in the table in main.py. Import heavy modules (rich, paramiko, libvirt) inside functions.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hvctl.cli.plain import plain
from hvctl.errors import HvctlError, Interrupted, UsageError
from hvctl.events import Event, Note, Progress, Sink, Stage, StepStarted

if TYPE_CHECKING:
    from rich.console import Console

    from hvctl.host import Host

T = TypeVar("T")

_WORKERS = 8


class App:
    """One run of the command line."""

    def __init__(self) -> None:
        self.is_json = False
        self._host: Host | None = None
        self._printing = threading.RLock()

    @property
    def host(self) -> Host:
        """The machine to work on, opened when first needed."""
        if self._host is None:
            from hvctl.host import Host
            from hvctl.hostside import keyring

            with contextlib.suppress(OSError):
                keyring.leave()  # what a login keeps there is nothing for the programs that are started from here on
            self._host = Host()
        return self._host

    def close(self) -> None:
        if self._host is not None:
            self._host.close()

    def console(self) -> Console:
        """Where tables go: coloured only on a terminal, never cut in a pipe."""
        from rich.console import Console

        return Console(highlight=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 4096)

    def say(self, text: str) -> None:
        """One line for people; with --json nothing."""
        if not self.is_json:
            with self._printing:
                print(text, flush=True)  # not click.echo: a progress bar moves aside for what goes through sys.stdout

    def print_result(self, value: object, for_people: Callable[[], None]) -> None:
        """The result of a command: `value` as JSON with --json, else whatever `for_people` prints."""
        if self.is_json:
            click.echo(json.dumps(value, indent=2, ensure_ascii=False))
        else:
            for_people()

    def print_table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table with a header; plain text in aligned columns when stdout is no terminal."""
        lines = [[click.unstyle(plain(str(cell))) for cell in row] for row in rows]
        if sys.stdout.isatty():
            from hvctl.cli import table

            table.write(self.console(), columns, lines)
            return
        widths = [max(len(line[index]) for line in [list(columns), *lines]) for index in range(len(columns))]
        for line in [list(columns), *lines]:
            click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())

    def print_pairs(self, pairs: Iterable[tuple[str, str]]) -> None:
        """`name   value` lines, the names aligned; pairs without a value are left out."""
        shown = [(name, value) for name, value in pairs if value]
        width = max((len(name) for name, _value in shown), default=0)
        for name, value in shown:
            click.echo(f"{click.style(name.ljust(width), bold=True)}  {click.unstyle(plain(value))}")

    @contextlib.contextmanager
    def progress(self) -> Iterator[Sink]:
        """A sink that shows notes, stages and progress on stderr: bars on a terminal, lines of notes elsewhere."""
        if self.is_json or not sys.stderr.isatty():
            yield self._tell_plainly
            return
        from hvctl.cli.progress import watch

        with watch() as sink:
            yield sink

    def for_each(self, names: Sequence[str], work: Callable[[str, Sink], T], done: Callable[[str, T], None]) -> None:
        """Do `work` on every name at once, `done` as each one ends, a line for each failure.

        Raises the first name's failure at the end (by order of names), already printed when there are several.
        """
        names = tuple(dict.fromkeys(names))
        with self.progress() as sink:
            if len(names) == 1:
                done(names[0], work(names[0], sink))
                return
            failures = self._work_in_threads(names, work, done, sink)
        if failures:
            raise _Printed(failures[0])

    def print_error(self, error: HvctlError) -> None:
        """A failure on stderr: one line, or with --json one object."""
        if isinstance(error, _Printed):
            return
        with contextlib.suppress(OSError):  # nobody listens any more: the exit code tells
            self._print_error(error)

    def _print_error(self, error: HvctlError) -> None:
        if self.is_json:
            details = {"error": error.kind, "message": error.message, "hint": error.hint, "code": error.code}
            click.echo(json.dumps(details, ensure_ascii=False), err=True)
        else:
            head, *rest = error.message.split("\n")
            click.echo(plain(f"hvctl: {head}" + (f"; next: {error.hint}" if error.hint else "")), err=True)
            for line in rest:  # the last lines of a guest's console
                click.echo(plain(f"  {line}"), err=True)

    def _work_in_threads(
        self, names: Sequence[str], work: Callable[[str, Sink], T], done: Callable[[str, T], None], sink: Sink
    ) -> list[HvctlError]:
        from concurrent.futures import ThreadPoolExecutor

        failed: dict[str, HvctlError] = {}

        def one(name: str) -> None:
            try:
                result = work(name, sink)
                with self._printing:
                    done(name, result)
            except HvctlError as error:
                if repr(name) not in error.message:
                    error.message = f"{name}: {error.message}"
                failed[name] = error
                self.print_error(error)

        with ThreadPoolExecutor(max_workers=min(_WORKERS, len(names))) as pool:
            futures = [pool.submit(one, name) for name in names]
            try:
                for future in futures:
                    future.result()
            except KeyboardInterrupt:
                self.host.cancelled.set()  # every worker stops at its next step and undoes
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return [failed[name] for name in names if name in failed]

    def _tell_plainly(self, event: Event) -> None:
        match event:
            case Note(subject, text) if not self.is_json:
                click.echo(plain(f"{subject}: {text}" if subject else text), err=True)
            case Note() | Progress() | Stage() | StepStarted():
                pass


class _Printed(HvctlError):
    """The first of several failures, each of which has been printed already."""

    def __init__(self, first: HvctlError) -> None:
        super().__init__(first.message, hint=first.hint)
        self.code = first.code


def output_options(function: Callable[..., T], json_help: str = "Print JSON for programs.") -> Callable[..., T]:
    """Add `--json` and `-v` to a command and hand it the App as first parameter."""

    @click.option("--json", "is_json", is_flag=True, help=json_help)
    @click.option("-v", "--verbose", is_flag=True, help="Show every program and definition on stderr.")
    @functools.wraps(function)
    def wrapper(*args: Any, is_json: bool, verbose: bool, **kwargs: Any) -> T:
        app: App = click.get_current_context().obj
        app.is_json = app.is_json or is_json
        if verbose:
            from hvctl.cli import logs

            logs.show_on_stderr()
        return function(app, *args, **kwargs)

    return wrapper


def failure_options(function: Callable[..., T]) -> Callable[..., T]:
    """As `output_options`, for a command whose output is somebody else's."""
    return output_options(function, "Print hvctl's own failure as JSON; the output is the command's.")


class NoCommand(click.UsageError):
    """A group has no such command; `hint`: what to type instead."""

    def __init__(self, word: str, hint: str, ctx: click.Context) -> None:
        super().__init__(f"there is no command {word!r}", ctx)
        self.hint = hint


class Group(click.Group):
    """A group of commands that knows how others call them. Alone it prints its help, and that nothing was done."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help(), err=True)
            ctx.exit(UsageError.code)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        word = args[0]
        if not ctx.resilient_parsing and not word.startswith("-") and self.get_command(ctx, word) is None:
            from hvctl.cli.words import find_meant

            raise NoCommand(word, find_meant(ctx.command_path, word, self.list_commands(ctx)), ctx)
        return super().resolve_command(ctx, args)


yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")
"""What goes with `confirm`."""


def confirm(app: App, question: str, *, yes: bool, why: str = "this cannot be undone") -> None:
    """Ask on a terminal; without one `--yes` is required. Raises UsageError, or Interrupted when the answer is no."""
    if yes:
        return
    if app.is_json or not (sys.stdin.isatty() and os.isatty(2)):
        raise UsageError(f"{why}, and there is no terminal to ask on", hint="add --yes")
    if not click.confirm(question, err=True):
        raise Interrupted("nothing was changed")
