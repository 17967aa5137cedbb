"""The `hvctl` command: its table of commands, and the one place where a failure is printed and becomes an exit code."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import select
import signal
import sys
from typing import Any, TextIO

import click

from hvctl import __version__
from hvctl.cli.app import App, Group
from hvctl.errors import HostError, HvctlError, InternalError, Interrupted, UsageError

# Command -> (module:attribute, what `hvctl --help` says). A module is imported only when its command is used.
COMMANDS = {
    "create": ("hvctl.cli.create:create", "Make one or more instances from an image."),
    "run": ("hvctl.cli.run:run", "Run a command in an instance that goes with it."),
    "list": ("hvctl.cli.query:list_", "List instances."),
    "show": ("hvctl.cli.query:show", "Show everything about one instance."),
    "usage": ("hvctl.cli.query:usage", "Show what instances take of the host."),
    "start": ("hvctl.cli.lifecycle:start", "Start, and wait until the guest answers."),
    "stop": ("hvctl.cli.lifecycle:stop", "Ask the guest to shut down."),
    "restart": ("hvctl.cli.lifecycle:restart", "Stop and start again."),
    "pause": ("hvctl.cli.lifecycle:pause", "Freeze a running instance in memory."),
    "resume": ("hvctl.cli.lifecycle:resume", "Let a paused instance go on."),
    "delete": ("hvctl.cli.lifecycle:delete", "Delete instances and everything that is theirs."),
    "rename": ("hvctl.cli.change:rename", "Give a stopped instance another name."),
    "set": ("hvctl.cli.change:set_", "Change CPUs, memory, autostart."),
    "kernel": ("hvctl.cli.change:kernel", "Boot the newest kernel that is installed in the guest."),
    "copy": ("hvctl.cli.copy:copy", "Make an instance that begins as another is."),
    "convert": ("hvctl.cli.convert:convert", "Change a VM into a container, or back."),
    "snapshot": ("hvctl.cli.snapshot:snapshot", "Take, list, show, revert, delete, compare snapshots."),
    "backup": ("hvctl.cli.backup:backup", "Back instances up, verify, restore them anywhere."),
    "ssh": ("hvctl.cli.enter:ssh", "Log in, or run a command, over ssh."),
    "exec": ("hvctl.cli.enter:exec_", "Run a command as root without the network."),
    "console": ("hvctl.cli.enter:console", "Attach to the serial console; ^] leaves."),
    "logs": ("hvctl.cli.query:logs", "Print the boot log."),
    "disk": ("hvctl.cli.disk:disk", "Data disks and volumes, the size of roots."),
    "image": ("hvctl.cli.image:image", "Build images, bring them from elsewhere, list and delete them."),
    "template": ("hvctl.cli.template:template", "List, show, check and render templates."),
    "host": ("hvctl.cli.hostcmd:host", "Set up, check and repair this machine."),
    "gc": ("hvctl.cli.gc:gc", "Finish or undo what a crash left behind."),
}


class LazyGroup(Group):
    """A group whose commands are named in a table and imported when used."""

    def __init__(self, *args: Any, table: dict[str, tuple[str, str]] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table = table or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.table, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.table:
            return super().get_command(ctx, cmd_name)
        module, attribute = self.table[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, text) for name, (_where, text) in self.table.items()]
        for name in super().list_commands(ctx):
            command = super().get_command(ctx, name)
            rows.append((name, command.get_short_help_str(100) if command else ""))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hvctl")
def hvctl() -> None:
    """Virtual machines and containers on your own Linux host, from one image, through one set of verbs.

    Start here:  hvctl host setup;  hvctl image build debian-12;  hvctl create web;  hvctl ssh web
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    _open_streams()
    gc.set_threshold(50_000)  # looking for garbage while modules are imported is a twentieth of a short command's time
    code = run_command(App(), sys.argv[1:] if arguments is None else arguments)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
            stream.flush()
    os._exit(code)  # everything is let go of; taking the interpreter apart would cost another 15 ms


def _open_streams() -> None:
    """A standard stream that is closed would be the next file to be opened, and go to a guest as one of `exec`'s."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def run_command(app: App, arguments: list[str]) -> int:
    """Run one command in this process; gives its exit code, everything printed."""
    from hvctl.cli import logs

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end like Ctrl-C: undo, then exit
    logs.start()
    try:
        code = _invoke(app, arguments)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except HvctlError as error:
        app.print_error(error)
        return _code(error, arguments)
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.ClickException as error:
        app.is_json = app.is_json or "--json" in arguments
        told = _usage_error(error)
        app.print_error(told)
        return _code(told, arguments)
    except (KeyboardInterrupt, click.Abort) as error:
        if isinstance(error, KeyboardInterrupt) and sys.stderr.isatty():
            click.echo(err=True)  # the terminal has shown ^C
        app.print_error(Interrupted("interrupted"))
        return Interrupted.code
    except OSError as error:
        failure = _host_error(error)
        if failure is None:
            return 0
        app.print_error(failure)
        return _code(failure, arguments)
    except Exception as error:  # noqa: BLE001  a bug: the last resort
        bug = InternalError(
            f"internal error: {type(error).__name__}: {' '.join(str(error).split())}", hint=logs.note(error)
        )
        app.print_error(bug)
        return _code(bug, arguments)
    finally:
        app.close()


def _invoke(app: App, arguments: list[str]) -> object:
    """As click's `main`, which would make an exit code of a broken pipe; completion is done there alone."""
    if "_HVCTL_COMPLETE" in os.environ:
        try:
            return hvctl.main(args=arguments, prog_name="hvctl")
        except SystemExit as done:
            return done.code
    with hvctl.make_context("hvctl", list(arguments), obj=app) as context:
        return hvctl.invoke(context)


def _host_error(error: OSError) -> HostError | None:
    """What the system refused. None: to write to stdout, because nobody reads it any more, which is no failure."""
    reason = error.strerror or str(error)
    if isinstance(error, BrokenPipeError) and _is_unread(sys.stdout):
        return None
    if error.filename is None and _raised_in(error).startswith(("click.", "rich.", "hvctl.cli.")):
        return HostError(f"the output could not be written: {reason}", hint="write it to another place")
    return HostError(f"{error.filename}: {reason}" if error.filename else reason, hint="hvctl host doctor")


def _is_unread(stream: TextIO) -> bool:
    """Whether a pipe or socket has no reader any more (poll(2))."""
    poll = select.poll()
    try:
        poll.register(stream, 0)
    except (OSError, ValueError):  # it is closed, or no file at all
        return False
    return bool(poll.poll(0))


def _raised_in(error: BaseException) -> str:
    """The module whose call to the system failed."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return str(last.tb_frame.f_globals.get("__name__")) if last else ""


def _code(error: HvctlError, arguments: list[str]) -> int:
    """The exit code; `ssh`, `exec` and `run` keep 255 for hvctl's own failures, as OpenSSH does."""
    return (
        255
        if arguments and arguments[0] in ("ssh", "exec", "run") and not isinstance(error, Interrupted)
        else error.code
    )


def _usage_error(error: click.ClickException) -> UsageError:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "hvctl"
    if isinstance(error, click.NoSuchOption):
        from hvctl.cli.options import find_advice

        return UsageError(f"No such option {error.option_name!r}", hint=find_advice(error))
    message = " ".join(error.format_message().split())  # click lists choices below each other
    return UsageError(message.rstrip("."), hint=getattr(error, "hint", f"{path} --help"))
