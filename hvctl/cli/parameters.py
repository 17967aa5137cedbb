"""Types of options and arguments: sizes, K=V pairs."""

from __future__ import annotations

import os
import re
from typing import Any

import click

from hvctl.model import Mount
from hvctl.units import parse_size

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}", re.ASCII)


class Size(click.ParamType):  # type: ignore[type-arg]  # click 8.1 has no parameters for it
    """`512M`, `2GiB` as bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return value if isinstance(value, int) else parse_size(value)


class Pair(click.ParamType):  # type: ignore[type-arg]
    """`K=V` as a pair."""

    name = "k=v"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if not equals or not _VARIABLE.fullmatch(key):
            self.fail(f"{value!r} is not K=V with a plain word K", param, ctx)
        return key, text


class Limit(Size):
    """A size, or `none`, which is 0."""

    name = "size|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return 0 if value == "none" else super().convert(value, param, ctx)


class Variable(click.ParamType):  # type: ignore[type-arg]
    """`K=V` for an environment, K whatever has no `=`, as a pair; `K` alone takes the caller's value."""

    name = "k=v"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if not key or "\0" in key + text:
            self.fail(f"{value!r} is not K=V", param, ctx)
        return key, text if equals else os.environ.get(key, "")


class SharedDirectory(click.ParamType):  # type: ignore[type-arg]
    """`SRC:DST[:ro]` as a Mount; what its root writes belongs to the caller, by SUDO_UID where sudo was used."""

    name = "mount"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Mount:
        if isinstance(value, Mount):
            return value
        source, *rest = str(value).split(":")
        if len(rest) not in (1, 2) or not source or not rest[0] or rest[1:] not in ([], ["ro"]):
            self.fail(f"{value!r} is not SRC:DST or SRC:DST:ro", param, ctx)
        uid, gid = (
            int(os.environ.get(f"SUDO_{kind}") or own) for kind, own in (("UID", os.getuid()), ("GID", os.getgid()))
        )
        target = rest[0].rstrip("/") or "/"
        return Mount(source=os.path.abspath(source), target=target, is_read_only=rest[1:] == ["ro"], uid=uid, gid=gid)


class WithCommand(click.Command):
    """A command whose last words, after `--`, are a command of the user's: the parameter `command`, not its own."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        command: list[str] = []
        if "--" in args:
            at = args.index("--")
            args, command = args[:at], args[at + 1 :]
        rest = super().parse_args(ctx, args)
        ctx.params["command"] = tuple(command)
        return rest


SIZE = Size()
LIMIT = Limit()
PAIR = Pair()
VARIABLE = Variable()
MOUNT = SharedDirectory()

__all__ = ["LIMIT", "MOUNT", "PAIR", "SIZE", "VARIABLE", "WithCommand"]
