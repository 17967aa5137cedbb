"""What a guest wrote moves no terminal."""

from __future__ import annotations

import pytest

from hvctl.cli.plain import plain


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("[  OK  ] Started ssh.service\ton tty1", "[  OK  ] Started ssh.service\ton tty1"),
        ("żółw 🐢 ", "żółw 🐢 "),
        ("\x1b[0;32m  OK  \x1b[0m up", "\x1b[0;32m  OK  \x1b[0m up\x1b[0m"),
        ("\x1b[31mred until its end", "\x1b[31mred until its end\x1b[0m"),
        ("\x1b[2J\x1b[1;1Hgone", "gone"),
        ("\x1b]0;a title\x07told", "told"),
        ("\x1b]52;c;Y3VybA==\x1b\\clip", "clip"),
        ("\x1bP$q\x1b\\asked", "asked"),
        ("\x1bcreset \x1b(0lines", "reset lines"),
        ("\x1b]0;no end", ""),
        ("bell\x07 back\x08 csi\x9b2J del\x7f cr\rover", "bell\\x07 back\\x08 csi\\x9b2J del\\x7f cr\\rover"),
        ("cut \x1b[", "cut \\x1b["),
    ],
)
def test_only_colours_are_left_of_what_a_terminal_obeys(said: str, shown: str) -> None:
    assert plain(said) == shown
