"""Tables on a terminal: what somebody may copy stands in one piece; where there is no room for all, other things give way.

The last column goes below its row where it has no room beside the others; sentences are broken into lines; then names
end with an ellipsis, the first column's last of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from hvctl.values import dataclass

_GAP = 2
_INDENT = 4
_WHOLE = ("FIX", "ADDRESS", "SOURCE")
"""As the last column these stand in one piece beside the others, or on a line of their own below."""
_SHORTENED = ("IMAGE", "KERNEL", "USED BY")
"""Columns that end with an ellipsis where there is no room for them, before the first one does."""
_LEAST = 6
"""As short as these get, where their headers are no longer."""
_SENTENCE = 20
"""A column that is this wide, and has several words in a cell, is broken into lines."""
_WORD = 25
"""A word that is longer is broken, too."""
_READABLE = 34
"""Lines that are shorter are tiring to read: then the last column goes below."""


@dataclass(frozen=True, kw_only=True)
class _Column:
    """How wide a column is on this terminal, and may get. `is_text`: it may be broken into lines."""

    name: str
    width: int
    least: int
    is_text: bool


def write(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table as wide as the terminal. What has no room even so goes beyond its edge rather than be cut."""
    cells = [[column, *(row[index] for row in rows)] for index, column in enumerate(columns)]
    measured = [_measure(column_cells) for column_cells in cells]
    below = columns[-1] if _goes_below(measured, console.width) else ""
    fitted = _fit(measured[:-1] if below else measured, console.width)
    _write_row(console, fitted, columns, is_header=True)
    for row in rows:
        _write_row(console, fitted, row)
        if below and row[-1]:
            _write_line(console, Text(f"{' ' * _INDENT}{below.lower()}: {row[-1]}"))


def _measure(cells: Sequence[str]) -> _Column:
    """As wide as its longest cell; at least, if it may be broken, as its longest word."""
    name, width = cells[0], max(map(cell_len, cells))
    if name not in (*_SHORTENED, *_WHOLE) and any(len(cell) >= _SENTENCE and " " in cell for cell in cells):
        longest = max(cell_len(word) for cell in cells for word in cell.split())
        return _Column(name=name, width=width, least=min(longest, _WORD), is_text=True)
    return _Column(name=name, width=width, least=width, is_text=False)


def _goes_below(columns: Sequence[_Column], width: int) -> bool:
    """Whether the last column has no room beside the others; only one that is long anyway, or that may be empty, may go."""
    *others, last = columns
    if not (last.is_text or last.name in (*_WHOLE, "COMMENT")):
        return False
    wanted = [_readable(column) for column in others]
    return _total([*wanted, _readable(last)]) > width


def _readable(column: _Column) -> int:
    return max(column.least, min(column.width, _READABLE)) if column.is_text else column.width


def _fit(columns: Sequence[_Column], width: int) -> Sequence[_Column]:
    """The columns, those that may give way less wide until there is room for all: the widest of a kind first."""
    widths = {column.name: column.width for column in columns}
    texts = {column.name: column.least for column in columns if column.is_text}
    shortened = {name: max(_LEAST, len(name)) for name in _SHORTENED if name in widths}
    first = {columns[0].name: max(_LEAST, len(columns[0].name))}
    for least in (texts, shortened, first):
        while _total(widths.values()) > width and (there := _list_giving(widths, least)):
            widths[max(there, key=lambda name: widths[name])] -= 1
    return [replace(column, width=widths[column.name]) for column in columns]


def _list_giving(widths: Mapping[str, int], least: Mapping[str, int]) -> list[str]:
    return [name for name in least if widths[name] > least[name]]


def _total(widths: Iterable[int]) -> int:
    """How wide columns are beside each other."""
    return sum(width + _GAP for width in widths) - _GAP


def _write_row(console: Console, columns: Sequence[_Column], row: Sequence[str], *, is_header: bool = False) -> None:
    """One row, of as many lines as its longest text."""
    blocks = [_break(console, column, cell) for column, cell in zip(columns, row, strict=False)]
    styles = ["bold" if is_header else _style(cell) for cell in row]
    for number in range(max(map(len, blocks))):
        line = Text()
        for column, block, style in zip(columns, blocks, styles, strict=False):
            text = block[number] if number < len(block) else ""
            line.append(set_cell_size(text, column.width), style=style)
            line.append(" " * _GAP)
        line.rstrip()
        _write_line(console, line)


def _break(console: Console, column: _Column, cell: str) -> list[str]:
    if cell_len(cell) <= column.width:
        return [cell]
    if column.is_text:
        return [line.plain.rstrip() for line in Text(cell).wrap(console, column.width, overflow="fold")]
    return [set_cell_size(cell, column.width - 1) + "…"]


def _write_line(console: Console, line: Text) -> None:
    console.print(line, soft_wrap=True)  # the terminal breaks what is too long, and copies it in one piece


def _style(cell: str) -> str:
    return {"running": "green", "ok": "green", "paused": "yellow", "warning": "yellow", "incomplete": "red",
            "crashed": "red", "failed": "red"}.get(cell, "")  # fmt: skip
