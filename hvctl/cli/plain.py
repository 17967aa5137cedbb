"""Text that a guest may have written, made fit for a terminal: colours stay, and nothing else that moves or tells it."""

from __future__ import annotations

import re

# ECMA-48: control sequences, strings (titles, the clipboard) up to their end, other escapes; then single controls,
# those of 8 bits and DEL as well. Tab and newline are text.
_SPECIAL = re.compile(
    r"(?P<colour>\x1b\[[0-9;:]*m)"
    r"|(?P<sequence>\x1b\[[0-?]*[ -/]*[@-~]|\x1b[]PX^_][^\x07\x1b\n]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-Z\\`-~])"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)
_RESET = "\x1b[0m"


def plain(text: str) -> str:
    """The text without control sequences but colours, which end with it; other control characters as Python writes them."""
    shown = _SPECIAL.sub(_show, text)
    return shown + _RESET if "\x1b" in shown and not shown.endswith(_RESET) else shown


def _show(found: re.Match[str]) -> str:
    if found["colour"]:
        return found[0]
    return "" if found["sequence"] else repr(found[0])[1:-1]
