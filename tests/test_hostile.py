"""Hostile archives, given to the confined worker: refused in one line, and nothing outside the tree is touched."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hvctl.config import Config
from hvctl.errors import InvalidSpec
from hvctl.host import Host
from hvctl.hostside import refusal, sandbox, unpack
from hvctl.rootfs import intake
from hvctl.rootfs.intake import Layer, Limits
from hvctl.units import GIB
from tests import hostile
from tests.trees import fingerprint

pytestmark = [pytest.mark.guest, pytest.mark.apart]  # needs root, and bubblewrap
REFUSED, CONTAINED = hostile.refused(), hostile.contained()
LIMITS = Limits(reserve_bytes=0, expanded_bytes=1 * GIB)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(Config(store=tmp_path, run=tmp_path))


@dataclass(frozen=True)
class Outcome:
    """How a worker ended, and what was around its tree before."""

    status: int
    stderr: str
    around: Path
    before: dict[str, tuple[Any, ...]]


def make_surroundings(folder: Path) -> Path:
    """A directory with files that nobody may touch; the tree is to be in it, as `tree`."""
    around = folder / "around"
    (around / "etc").mkdir(parents=True)
    for name in ("canary", "etc/passwd", "x"):
        (around / name).write_text("untouched")
    return around


def write(folder: Path, *archives: bytes) -> list[Layer]:
    """Archives as files, root's and private."""
    layers = []
    for number, content in enumerate(archives):
        path = folder.parent / f"layer{number}"
        path.write_bytes(content)
        layers.append(Layer(path=path))
    return layers


# A sandbox takes a tenth of a second and there are hundreds of archives: all are given to workers in one, which finds
# around each tree, within its reach, what nobody may touch. The long run gives each to a sandbox of its own.
_MANY = """
import json, os, sys
sys.path.insert(0, "/code")
from hvctl.hostside import sandbox, unpack
results = {}
for case, request in json.load(open("/work/requests")).items():
    sandbox.WORK, sandbox.INPUTS = f"/work/{case}/around/tree", f"/work/{case}"
    errors, into = os.pipe()
    process = os.fork()
    if process == 0:
        os.dup2(into, 2)
        unpack.main([request])
        os._exit(0)
    os.close(into)
    said = open(errors, errors="replace").read()
    results[case] = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), said]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What became of every archive of `hostile`, by its name."""
    folder = tmp_path_factory.mktemp("hostile")
    cases = {**{name: archives for name, (archives, _why) in REFUSED.items()}, **CONTAINED}
    requests, before = {}, {}
    for number, (name, archives) in enumerate(cases.items()):
        around = make_surroundings(folder / str(number))
        (around / "tree").mkdir()
        for layer, content in enumerate(archives):
            (around.parent / str(layer)).write_bytes(content)
        request = unpack.Request(
            archives=(unpack.Archive(),) * len(archives), bounds=intake._bounds(LIMITS), has_whiteouts=True
        )
        requests[str(number)] = unpack.format_request(request)
        before[name] = fingerprint(around, but="tree")
    (folder / "requests").write_text(json.dumps(requests))
    confinement = sandbox.Confinement(
        directory=folder,
        read_only=sandbox.CODE,
        capabilities=unpack.CAPABILITIES,
    )
    argv = sandbox.command(confinement, ["/usr/bin/python3", "-ISB", "-c", _MANY])
    done = subprocess.run(argv, capture_output=True, check=True, timeout=300)
    return {
        name: Outcome(*json.loads(done.stdout)[str(number)], folder / str(number) / "around", before[name])
        for number, name in enumerate(cases)
    }


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_archive_is_refused_with_a_reason(outcomes: dict[str, Outcome], name: str) -> None:
    outcome = outcomes[name]
    lines = [line for line in outcome.stderr.splitlines() if not line.startswith(refusal.PROGRESS)]
    assert outcome.status == refusal.REFUSED and len(lines) == 1, outcome
    assert re.search(REFUSED[name][1], lines[0])
    assert lines[0].isprintable() and len(lines[0]) < 300
    assert fingerprint(outcome.around, but="tree") == outcome.before


@pytest.mark.parametrize("name", CONTAINED)
def test_what_is_taken_stays_inside(outcomes: dict[str, Outcome], name: str) -> None:
    outcome = outcomes[name]
    assert outcome.status == 0, outcome
    for path in (outcome.around / "tree").rglob("*"):
        assert not (path.is_block_device() or path.is_char_device())
        assert "overlay" not in str(os.listxattr(path, follow_symlinks=False))
    assert fingerprint(outcome.around, but="tree") == outcome.before


@pytest.mark.parametrize(
    "name", ["name ../x", "hard link to ../canary", "whiteout ../.wh.canary", "gzip cut short", "noise"]
)
def test_a_refusal_is_one_line_for_the_user(host: Host, tmp_path: Path, name: str) -> None:
    refuse(host, make_surroundings(tmp_path), name)


@pytest.mark.long
@pytest.mark.parametrize("name", REFUSED)
def test_every_refusal_is_one_line_for_the_user(host: Host, tmp_path: Path, name: str) -> None:
    refuse(host, make_surroundings(tmp_path), name)


def refuse(host: Host, around: Path, name: str) -> None:
    """Give it to hvctl as a source of images would."""
    archives, reason = REFUSED[name]
    before = fingerprint(around, but="tree")
    with pytest.raises(InvalidSpec, match=reason) as caught:
        intake.unpack_layers(host, write(around, *archives), around / "tree", limits=LIMITS, subject="evil")
    message = caught.value.message
    assert message.startswith("cannot unpack 'evil': ") and message.isprintable() and len(message) < 400
    assert caught.value.hint
    assert fingerprint(around, but="tree") == before


def test_there_are_at_least_a_hundred() -> None:
    assert len(REFUSED) + len(CONTAINED) >= 100
