"""Rendering beside: another process gives what this one would, and nothing depends on it."""

from __future__ import annotations

import os
import select
import subprocess
import sys

import pytest

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


LEFT = """
import os, time
from hvctl import rendering
rendering.begin("<domain/>")
print(open(f"/proc/self/task/{os.getpid()}/children").read(), flush=True)
time.sleep(600)
"""


def test_the_process_beside_ends_with_the_one_that_began_it() -> None:
    """Also when that is killed: who reads what hvctl prints does not wait for longer."""
    with subprocess.Popen([sys.executable, "-c", LEFT], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        handle = os.pidfd_open(int(first.stdout.readline()))
        try:
            first.kill()
            assert first.stdout.read() == ""
            ended = select.poll()
            ended.register(handle, select.POLLIN)
            assert ended.poll(30_000)
        finally:
            os.close(handle)
