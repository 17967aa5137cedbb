"""The wheel carries what the code needs beside itself, and a checkout finds it too."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hvctl import templates
from hvctl.rootfs import guestfiles

ROOT = Path(__file__).parent.parent


def test_a_checkout_finds_its_templates() -> None:
    assert templates.builtin_folder() == ROOT / "domain_templates"
    assert {item.name for item in templates.list_templates(())} >= {"default", "uefi", "nested"}


@pytest.mark.guest  # pip fetches the build backend
def test_a_wheel_finds_its_templates_and_guest_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(wheel).extractall(unpacked)
    program = (
        "from hvctl import templates; from hvctl.rootfs import guestfiles; import hvctl\n"
        "print(hvctl.__file__); print(len(templates.list_templates(()))); print(len(guestfiles.pack()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env=environment,
        cwd=tmp_path,
    )
    file, count, size = done.stdout.split()
    assert Path(file).is_relative_to(unpacked)
    assert int(count) == len(templates.list_templates(()))
    assert int(size) == len(guestfiles.pack())
