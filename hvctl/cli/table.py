"""Tables on a terminal: what somebody may copy stands in one piece, names give way where there is no room for all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hvctl.values import dataclass

_GAP = 2
_SHORTENED = (("IMAGE", "KERNEL", "USED BY"), ("NAME",))
"""Columns that end with an ellipsis where there is no room for them, those that give way first."""
_LEAST = 6
"""As short as these get, where their headers are no longer."""
_SENTENCE = 20
"""A column that is this wide, and has several words in a cell, is broken into lines."""
_WORD = 25
"""A word that is longer is broken, too."""


@dataclass(frozen=True, kw_only=True)
class _Column:
    """How wide a column is on this terminal. `is_text`: it may be broken into lines, and takes what is left."""

    name: str
    width: int
    is_text: bool


def write(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table as wide as the terminal. What has no room even so goes beyond its edge rather than be cut."""
    cells = [[column, *(row[index] for row in rows)] for index, column in enumerate(columns)]
    fitted = _shorten([_measure(column_cells) for column_cells in cells], console.width)
    console.width = max(console.width, _total(column.width for column in fitted))
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, _GAP, 0, 0))
    for column in fitted:
        if column.is_text:
            table.add_column(column.name, overflow="fold", min_width=column.width)
        else:
            table.add_column(column.name, no_wrap=True, min_width=column.width, max_width=column.width)
    for row in rows:
        table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
    console.print(table, crop=False)


def _measure(cells: Sequence[str]) -> _Column:
    """As wide as its longest cell; of one that may be broken, as its longest word."""
    name = cells[0]
    if any(len(cell) >= _SENTENCE and " " in cell for cell in cells) and not any(name in names for names in _SHORTENED):
        longest = max(len(word) for cell in cells for word in cell.split())
        return _Column(name=name, width=min(longest, _WORD), is_text=True)
    return _Column(name=name, width=max(map(len, cells)), is_text=False)


def _shorten(columns: Sequence[_Column], width: int) -> Sequence[_Column]:
    """The columns, the longest of those that may be shortened less until there is room for all."""
    widths = {column.name: column.width for column in columns}
    for names in _SHORTENED:
        there = [name for name in names if _is_long(widths, name)]
        while there and _total(widths.values()) > width:
            longest = max(there, key=lambda name: widths[name])
            widths[longest] -= 1
            there = [name for name in there if _is_long(widths, name)]
    return [_Column(name=column.name, width=widths[column.name], is_text=column.is_text) for column in columns]


def _is_long(widths: Mapping[str, int], name: str) -> bool:
    return widths.get(name, 0) > max(_LEAST, len(name))


def _total(widths: Iterable[int]) -> int:
    """How wide columns are beside each other."""
    return sum(width + _GAP for width in widths) - _GAP


def _style(cell: str) -> str:
    return {"running": "green", "ok": "green", "paused": "yellow", "warning": "yellow", "incomplete": "red",
            "crashed": "red", "failed": "red"}.get(cell, "")  # fmt: skip
