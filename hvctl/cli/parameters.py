"""Types of options and arguments: sizes, K=V pairs."""

from __future__ import annotations

import re
from typing import Any

import click

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


SIZE = Size()
PAIR = Pair()

__all__ = ["PAIR", "SIZE"]
