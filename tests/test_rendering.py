"""Rendering beside: another process gives what this one would, and nothing depends on it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli import wait_for

TEMPLATE = "<domain>{{ name }}{% for item in items %} {{ item[0] }}={{ item[1] }}{% endfor %}</domain>"

# Prints what was rendered, whether this process has loaded Jinja itself, and how many children it has.
SCRIPT = """
import marshal, os, signal, sys, time
from hvctl import rendering
template, deed = sys.argv[1:]
rendering.begin(template)
children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
if deed == "kill":
    os.kill(int(children[0]), signal.SIGKILL)
values = {"name": "a & b", "items": (("x", 1), ("y", True))}
if deed == "foreign": values["other"] = object()
if deed == "undefined": del values["name"]
try:
    said = [rendering.render(template, values) for _time in range(2)]
except rendering.RenderError as error:
    said = [str(error), str(error.is_undefined)]
print(*said, "jinja2" in sys.modules, len(children), sep="|")
"""


def render(deed: str, source: str = TEMPLATE) -> list[str]:
    words = [sys.executable, "-c", SCRIPT, source, deed]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip().split("|")


RENDERED = ["<domain>a &amp; b x=1 y=True</domain>"] * 2


@pytest.mark.parametrize(
    ("deed", "here"), [("", "False"), ("kill", "True"), ("foreign", "True")], ids=["beside", "killed", "foreign value"]
)
def test_what_comes_from_beside_is_what_would_come_from_here(deed: str, here: str) -> None:
    assert render(deed) == [*RENDERED, here, "1"]


def test_a_mistake_is_told_from_beside_as_from_here() -> None:
    assert render("undefined") == ["'name' is undefined", "True", "False", "1"]
    said, is_undefined, here, _children = render("", "<domain>{{ 1 / 0 }}</domain>")
    assert ("division" in said, is_undefined, here) == (True, "False", "False")


ENDLESS = "{% for number in range(10 ** 15) %}{% endfor %}"
LEFT = """
import os, sys, time
from hvctl import rendering
rendering.begin(sys.argv[1])
print(open(f"/proc/self/task/{os.getpid()}/children").read(), flush=True)
rendering.render(sys.argv[2], {}) if sys.argv[2:] else time.sleep(600)
"""


@pytest.mark.parametrize(
    ("number", "templates"),
    [(signal.SIGKILL, ["<domain/>"]), (signal.SIGKILL, [ENDLESS]), (signal.SIGINT, ["<domain/>", ENDLESS])],
    ids=["killed", "killed while it renders", "interrupted while it waits"],
)
def test_the_process_beside_ends_with_the_one_that_began_it(number: int, templates: list[str]) -> None:
    """Also when that is killed: who reads what hvctl prints does not wait for longer."""
    words = [sys.executable, "-c", LEFT, *templates]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        assert first.stdout and first.stderr
        handle = os.pidfd_open(beside := int(first.stdout.readline()))
        try:
            if ENDLESS in templates:  # it is at it, not only loading, once it has used the processor for that long
                wait_for(lambda: sum(map(int, Path(f"/proc/{beside}/stat").read_text().split()[13:15])) >= 100)
            first.send_signal(number)
            assert first.stdout.read() == ""
            ended = select.poll()
            ended.register(handle, select.POLLIN)
            assert ended.poll(30_000)
        finally:
            os.close(handle)
            first.kill()
