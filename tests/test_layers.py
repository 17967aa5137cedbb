"""Layers of containers against the kernel's own overlay: mergers show the same, differences are those that it shows."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvctl.errors import HostError
from hvctl.hostside import differences, files, layers, mounts
from hvctl.shell import LocalShell
from tests.trees import scribble, view

pytestmark = [pytest.mark.guest, pytest.mark.apart]

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def overlay(folder: Path, lowers: list[str], upper: str = "") -> Iterator[Path]:
    """A mounted overlay; `lowers` lowest first."""
    target = folder / "root"
    target.mkdir(exist_ok=True)
    here = os.getcwd()
    os.chdir(folder)
    try:
        if upper:
            work = folder / f"{upper}.work"
            work.mkdir(exist_ok=True)
            mounts.overlay(lowers[::-1], upper, work.name, "root")
        else:
            options = f"lowerdir={':'.join(lowers[::-1])}"
            assert _libc.mount(b"overlay", b"root", b"overlay", 1, options.encode()) == 0
        yield target
    finally:
        mounts.unmount(target)
        os.chdir(here)


def make_stack(folder: Path, dice: random.Random, count: int) -> list[str]:
    """An image and some layers on it, each written through the kernel's overlay."""
    names = ["image"]
    (folder / "image").mkdir(mode=0o755)
    for _change in range(30):
        scribble(folder / "image", dice)
    for number in range(count):
        name = f"layer{number}"
        (folder / name).mkdir(mode=0o755)
        with overlay(folder, names, name) as root:
            for _change in range(dice.randrange(1, 12)):
                scribble(root, dice)
        names.append(name)
    return names


@pytest.mark.parametrize("_round", range(30))
def test_a_merger_shows_what_its_layers_show(tmp_path: Path, _round: int) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    names = make_stack(tmp_path, dice, 5)
    with overlay(tmp_path, names) as root:
        wanted = view(root)
    first = dice.randrange(1, 4)
    last = dice.randrange(first + 1, 6)
    paths = [tmp_path / name for name in names]
    layers.merge_uppers(paths[first : last + 1], paths[:first], tmp_path / "merged")
    with overlay(tmp_path, [*names[:first], "merged", *names[last + 1 :]]) as root:
        assert view(root) == wanted
    # It takes the place of the last, before anybody lets go of the others: nobody sees a difference then either.
    with overlay(tmp_path, [*names[:last], "merged", *names[last + 1 :]]) as root:
        assert view(root) == wanted


def test_a_file_with_as_many_links_as_it_may_have_is_merged(tmp_path: Path) -> None:
    """ext4 takes 65,000 (other file systems more): beyond them the names that are left get a copy."""
    upper, count = tmp_path / "upper", 40_000
    upper.mkdir()
    (upper / "0").write_text("many")
    os.setxattr(upper / "0", "user.kept", b"yes")
    for number in range(1, count):
        os.link(upper / "0", upper / str(number))
    layers.merge_uppers([upper], [], tmp_path / "merged")
    assert len(os.listdir(tmp_path / "merged")) == count
    last = tmp_path / "merged" / str(count - 1)
    assert (last.read_text(), os.getxattr(last, "user.kept")) == ("many", b"yes")
    assert len({path.stat().st_ino for path in (tmp_path / "merged").iterdir()}) <= 2


def test_what_is_nested_too_deeply_is_told_in_words(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    subprocess.run(["mkdir", "-p", "/".join([str(upper), *["d"] * 1200])], check=True)
    with pytest.raises(HostError, match="nested too deeply"):
        LocalShell().call(layers.merge_uppers, [upper], [], tmp_path / "merged")
    files.remove(tmp_path / "merged")
    files.remove(upper)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("_round", range(30))
def test_differences_are_those_that_the_kernel_shows(tmp_path: Path, _round: int) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    names = make_stack(tmp_path, dice, 4)
    chosen = [names[: dice.randrange(2, 6)] for _stack in range(2)]
    views = []
    for stack in chosen:
        with overlay(tmp_path, stack) as root:
            views.append(view(root))
    old, new = views
    wanted = {(differences.ADDED, path) for path in set(new) - set(old)}
    wanted |= {(differences.REMOVED, path) for path in set(old) - set(new)}
    wanted |= {(differences.CHANGED, path) for path in set(old) & set(new) if old[path] != new[path]}
    trees = [tuple(differences.Tree(tmp_path / name, 0) for name in reversed(stack)) for stack in chosen]
    assert set(differences.list_differences(*trees)) == wanted


def test_a_layer_is_untouched_until_something_is_written(tmp_path: Path) -> None:
    from hvctl.hostside import roots

    for layer, parent in (("one", ""), ("two", "one")):
        roots.make_layer(tmp_path / layer, 70000, parent)
    upper, below = tmp_path / "two" / "upper", tmp_path / "one" / "upper"
    assert layers.is_untouched_upper(upper, below)
    upper.chmod(0o750)
    assert not layers.is_untouched_upper(upper, below)
    upper.chmod(0o755)
    (upper / "sys" / "file").touch()
    assert not layers.is_untouched_upper(upper, below)
    (upper / "sys" / "file").unlink()
    assert layers.is_untouched_upper(upper, below)


def test_a_stack_that_stands_on_itself_ends(tmp_path: Path) -> None:
    for layer, parent in (("one", "two"), ("two", "one")):
        (tmp_path / layer).mkdir()
        layers.write_facts(tmp_path / layer, layers.Facts(parent=parent))
    with pytest.raises(OSError, match="itself"):
        layers.list_stack(tmp_path, "one")
