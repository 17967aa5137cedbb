"""A disk in layers as QEMU leaves them, its file system written by the kernel: for what reads both without either."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

_CLUSTER_BYTES = 64 * 1024


def make_file_system(disk: Path, size_bytes: int, *words: str, offset: int = 0, tree: Path | None = None) -> None:
    """A file system in a raw disk, of a tree that has an etc/os-release unless one is given."""
    with tempfile.TemporaryDirectory() as made:
        (Path(made) / "etc").mkdir()
        (Path(made) / "etc/os-release").write_text("ID=test\n")
        with disk.open("ab") as file:
            file.truncate(max(disk.stat().st_size, offset + size_bytes))
        where = ["-E", f"offset={offset}"] if offset else []
        command = ["mke2fs", "-q", "-F", *words, *where, "-d", str(tree or made), str(disk), f"{size_bytes // 1024}k"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)


@contextlib.contextmanager
def mounted(disk: Path, *, offset: int = 0, options: str = "") -> Iterator[Path]:
    """Its files, to be written."""
    with tempfile.TemporaryDirectory() as target:
        subprocess.run(["mount", "-o", f"loop,offset={offset}{options}", str(disk), target], check=True, timeout=60)
        try:
            yield Path(target)
        finally:
            subprocess.run(["umount", target], check=True, timeout=60)


def to_base(raw: Path, base: Path) -> None:
    """A disk that stands alone."""
    words = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(base)]
    subprocess.run(words, check=True, capture_output=True, timeout=60)


def to_layer(before: Path, after: Path, layer: Path, below: Path | None = None) -> None:
    """Write to a layer, made on another where one is named, what makes of the raw disk `before` the raw disk `after`."""
    if below is not None:
        words = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(below), str(layer)]
        subprocess.run([*words, str(after.stat().st_size)], check=True, timeout=60)
    old, new = before.read_bytes(), after.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        commands: list[str] = []
        for start in range(0, len(new), _CLUSTER_BYTES):
            content = new[start : start + _CLUSTER_BYTES]
            if content != old[start : start + _CLUSTER_BYTES]:
                (Path(folder) / str(start)).write_bytes(content)
                commands += ["-c", f"write -s {folder}/{start} {start} {len(content)}"]
        subprocess.run(
            ["qemu-io", "-f", "qcow2", *commands, str(layer)], check=True, capture_output=True, input=b"", timeout=60
        )


def question(files: Sequence[Path], old: Sequence[int], new: Sequence[int]) -> dict[str, object]:
    """What the worker is asked of these files."""
    return {"formats": ["qcow2" for _file in files], "old": list(old), "new": list(new)}
