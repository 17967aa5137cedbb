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


def lines(width: int, *rows: tuple[str, ...], columns: tuple[str, ...] = COLUMNS) -> list[str]:
    out = io.StringIO()
    table.write(Console(file=out, width=width, force_terminal=False), columns, rows)
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


def test_what_is_copied_goes_below_its_row_in_one_piece_where_it_has_no_room() -> None:
    fix = "sysctl -w net.bridge.bridge-nf-call-iptables=0"
    rows = (
        ("warning", "firewall", "net.bridge.bridge-nf-call-iptables is on: the host's firewall may drop much", fix),
        ("ok", "cgroups as libvirt sees them", "version 1", ""),
    )
    columns = ("VERDICT", "CHECK", "REASON", "FIX")
    found = lines(80, *rows, columns=columns)
    assert found[0].split() == ["VERDICT", "CHECK", "REASON"]
    assert f"    fix: {fix}" in found
    assert max(map(len, found)) <= 80 and found[-1].split()[0] == "ok"
    assert lines(160, *rows, columns=columns)[1].endswith(fix)


def test_the_name_that_is_typed_is_whole_beside_a_long_address() -> None:
    address = f"https://example.org/{'a' * 80}.qcow2"
    row = ("opensuse-15.6", "opensuse-leap 15.6", "opensuse", "signature", address)
    found = lines(80, row, columns=("NAME", "OS", "USER", "VERIFIED BY", "ADDRESS"))
    assert (found[1].split()[0], found[2]) == ("opensuse-15.6", f"    address: {address}")


@pytest.mark.parametrize(
    ("comment", "below"), [("", []), ("a b of some words here", ["    comment: a b of some words here"])]
)
def test_a_header_stays_on_its_line(comment: str, below: list[str]) -> None:
    row = ("wd-box@20261127-213437-830086", "11s", "container", "frozen", "437MiB", "437MiB", "vm", comment)
    columns = ("BACKUP", "AGE", "MODE", "HOW", "SIZE", "NEW", "HOST", "COMMENT")
    assert lines(77, row, columns=columns)[1:] == ["  ".join(row[:-1]).rstrip(), *below]
    assert lines(77, row, columns=columns)[0].split() == list(columns[:-1])


def test_what_is_wide_on_a_terminal_is_counted_as_that() -> None:
    found = lines(60, ("東京" * 8, "x" * 30), columns=("NAME", "USED BY"))
    assert found[1].split()[0] == "東京" * 8 and found[1].endswith("…")


def test_without_a_terminal_nothing_is_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    App().print_table(COLUMNS, [ROW, WIDE])
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[1:]] == [ROW[0], WIDE[0]]


@pytest.mark.parametrize(
    ("users", "shown"),
    [((), "-"), (("a", "b"), "a, b"), (("a", "b", "c"), "a, b, +1"), (tuple("abcdefghijklmn"), "a, b, +12")],
)
def test_of_many_users_two_are_named(users: tuple[str, ...], shown: str) -> None:
    assert imageview.format_users(users) == shown
