"""Tables: on a terminal no address is ever broken and names give way; elsewhere everything stands in full."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from hvctl.cli import imageview, present, table
from hvctl.cli.app import App

COLUMNS = present.LIST_COLUMNS
ROW = ("web-server-1", "running", "container", "debian-12", "2", "1GiB", "10.62.249.133", "25m53s")
WIDE = (
    "a-name-of-more-than-thirty-letters",
    "incomplete",
    "container, privileged",
    "ubuntu-24.04-minimal",
    "16",
    *ROW[5:],
)


def lines(width: int, *rows: tuple[str, ...]) -> list[str]:
    out = io.StringIO()
    table.write(Console(file=out, width=width, force_terminal=False), COLUMNS, rows)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_a_table_that_has_room_is_left_as_it_is() -> None:
    assert lines(80, ROW)[1].split() == list(ROW)


@pytest.mark.parametrize("width", [40, 75, 79])
def test_where_there_is_little_room_each_row_is_a_line_with_its_address(width: int) -> None:
    found = lines(width, ROW, ROW)
    assert len(found) == 3
    assert all(row.split()[-2:] == ["10.62.249.133", "25m53s"] for row in found[1:])
    assert max(map(len, found)) <= max(width, 75)


def test_the_image_gives_way_before_the_name() -> None:
    assert lines(79, ROW)[1].split()[::3] == ["web-server-1", "debian-…", "10.62.249.133"]
    assert lines(76, ROW)[1].split()[0] == "web-server…"


def test_what_has_several_words_is_broken_between_them() -> None:
    found = lines(80, WIDE)
    assert ("ubunt…" in found[1], "10.62.249.133" in found[1], found[2].split()) == (True, True, ["privileged"])


def test_without_a_terminal_nothing_is_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    App().print_table(COLUMNS, [ROW, WIDE])
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[1:]] == [ROW[0], WIDE[0]]


@pytest.mark.parametrize(
    ("users", "shown"),
    [((), "-"), (("a", "b"), "a, b"), (("a", "b", "c"), "a, b, +1"), (tuple("abcdefghijklmn"), "a, b, +12")],
)
def test_of_many_users_two_are_named(users: tuple[str, ...], shown: str) -> None:
    assert imageview.format_users(users) == shown
