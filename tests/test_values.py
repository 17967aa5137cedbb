"""`hvctl.values.dataclass` makes what the standard library's makes, as far as hvctl goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import FrozenInstanceError, field
from typing import Any

import pytest

from hvctl import values


def make(dataclass: Callable[..., Any]) -> tuple[type[Any], type[Any]]:
    """A class of named fields and one of positional ones."""

    @dataclass(frozen=True, kw_only=True)
    class Named:
        first: int
        secret: str = field(default="hush", repr=False)
        many: list[int] = field(default_factory=list)

    @dataclass(frozen=True)
    class Placed:
        """One with a text."""

        first: int
        second: tuple[str, ...] = ()

    return Named, Placed


OURS, THEIRS = make(values.dataclass), make(dataclasses.dataclass)


@pytest.mark.parametrize(
    "act",
    [
        lambda named, _placed: repr(named(first=1, many=[2])),
        lambda named, _placed: vars(named(first=1)),
        lambda named, _placed: named(first=1) == named(first=1, secret="hush"),
        lambda named, _placed: named(first=1) == named(first=2),
        lambda named, placed: named(first=1) == placed(first=1),
        lambda named, _placed: named(first=1).many is named(first=1).many,
        lambda named, _placed: dataclasses.asdict(named(first=1)),
        lambda named, _placed: repr(dataclasses.replace(named(first=1), first=3)),
        lambda named, _placed: [item.name for item in dataclasses.fields(named)],
        lambda _named, placed: repr(placed(1, ("a",))),
        lambda _named, placed: repr(placed(1, second=("a",))),
        lambda _named, placed: hash(placed(1, ("a",))) == hash(placed(1, ("a",))),
        lambda _named, placed: len({placed(1), placed(1), placed(2)}),
        lambda _named, placed: placed.__doc__,
    ],
)
def test_it_is_what_the_standard_librarys_is(act: Callable[..., object]) -> None:
    assert act(*OURS) == act(*THEIRS)


@pytest.mark.parametrize(
    "act",
    [
        lambda named, _placed: named(1),
        lambda named, _placed: named(),
        lambda named, _placed: named(first=1, nosuch=2),
        lambda _named, placed: placed(1, (), 3),
        lambda _named, placed: placed(1, first=1),
        lambda _named, placed: setattr(placed(1), "first", 2),
        lambda _named, placed: delattr(placed(1), "first"),
        lambda named, _placed: hash(named(first=1)),
    ],
)
def test_it_refuses_what_the_standard_librarys_refuses(act: Callable[..., object]) -> None:
    for classes in (OURS, THEIRS):
        with pytest.raises((TypeError, FrozenInstanceError)):
            act(*classes)


def test_what_can_change_is_the_standard_librarys() -> None:
    @values.dataclass
    class Counter:
        count: int = 0

    counter = Counter()
    counter.count += 1
    assert counter == Counter(1)
