"""The limits that hold a container now are read from its control groups, of either version."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvctl.hostside import groups, held

V1 = {
    "memory/machine/memory.limit_in_bytes": "1000000\n",  # what is around all containers is not theirs
    "memory/machine/lxc-1-x/memory.limit_in_bytes": "268435456\n",
    "cpu/machine/lxc-1-x/cpu.cfs_quota_us": "200000\n",
    "cpu/machine/lxc-1-x/cpu.cfs_period_us": "100000\n",
}
V1_OPEN = {**V1, "memory/machine/lxc-1-x/memory.limit_in_bytes": "9223372036854771712\n"}
V1_OPEN["cpu/machine/lxc-1-x/cpu.cfs_quota_us"] = "-1\n"
V2 = {
    "unified/machine.slice/memory.max": "1000000\n",
    "unified/machine.slice/a.scope/memory.max": "268435456\n",
    "unified/machine.slice/a.scope/cpu.max": "300000 100000\n",
    "unified/machine.slice/a.scope/libvirt/memory.max": "max\n",  # the container's root has lifted it
    "unified/machine.slice/a.scope/libvirt/cpu.max": "max 100000\n",
}
IN_V1 = [("memory", "/machine/lxc-1-x"), ("cpu,cpuacct", "/machine/lxc-1-x"), ("", "/")]
IN_V2 = [("", "/machine.slice/a.scope/libvirt")]


@pytest.mark.parametrize(
    ("tree", "memberships", "found"),
    [(V1, IN_V1, (2, 268435456)), (V1_OPEN, IN_V1, (0, 0)), (V2, IN_V2, (3, 268435456)), ({}, IN_V1, (0, 0))],
    ids=["version 1", "version 1, no limit", "version 2", "it has ended"],
)
def test_what_holds_is_what_the_kernel_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tree: dict[str, str],
    memberships: list[tuple[str, str]],
    found: tuple[int, int],
) -> None:
    pretend(tmp_path, monkeypatch, tree, memberships)
    assert held.read_limits(1) == found


def pretend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tree: dict[str, str], memberships: list[tuple[str, str]]
) -> None:
    for name, content in tree.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    hierarchies = {name: str(tmp_path / name) for name in ("memory", "cpu", "cpuacct")}
    monkeypatch.setattr(groups, "find_hierarchies", lambda: hierarchies)
    monkeypatch.setattr(groups, "find_unified", lambda: str(tmp_path / "unified"))
    monkeypatch.setattr(groups, "find_memberships", lambda _process: memberships)


USED = {
    "unified/machine.slice/a.scope/libvirt/memory.current": "100000\n",
    "unified/machine.slice/a.scope/libvirt/memory.stat": "anon 60000\nactive_file 20000\ninactive_file 5000\nshmem 9000\n",
}


@pytest.mark.parametrize(
    ("tree", "memberships", "kept"),
    [(USED, IN_V2, 75000), (V1, IN_V1, 0), ({}, IN_V2, 0)],
    ids=["version 2", "version 1", "it has ended"],
)
def test_what_is_kept_is_all_but_the_pages_of_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tree: dict[str, str],
    memberships: list[tuple[str, str]],
    kept: int,
) -> None:
    pretend(tmp_path, monkeypatch, tree, memberships)
    assert held.read_kept(1) == kept
