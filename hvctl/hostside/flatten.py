"""The root of a container as one tree: its layers on the image's tree, whiteouts applied, owners as inside, copied out.

Run as a process of its own in a mount namespace of its own (`command`), so that whatever ends it takes the mounts away.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hvctl.hostside import files, mounts
from hvctl.hostside.ids import COUNT
from hvctl.hostside.mounts import Extent
from hvctl.hostside.sandbox import python_words

_CODE = Path(__file__).parents[2]
_MS_RDONLY = 1


def command(scratch: Path, lowers: Sequence[tuple[Path, int]], target: Path) -> list[str]:
    """The words that copy a stack of layers to `target`; `lowers`: the lowest first, with the first id of who wrote it."""
    request = json.dumps([str(scratch), [[str(path), first_id] for path, first_id in lowers], str(target)])
    return ["unshare", "--mount", "--propagation", "private", "--", *python_words(str(_CODE), "flatten", [request])]


def main(arguments: Sequence[str]) -> None:
    """Mount the stack below the scratch directory, read-only, and copy what it shows."""
    scratch, lowers, target = json.loads(arguments[0])
    os.chdir(scratch)
    files.make_directory(Path("below"), 0o700)
    files.make_directory(Path("merged"), 0o700)
    names: list[str] = []
    for number, (path, first_id) in enumerate(lowers):
        place = Path("below", str(number))
        files.make_directory(place, 0o700)
        if first_id:
            extents = [Extent(first_id, 0, COUNT)]
            with mounts.open_owners(extents, extents) as owners:
                mounts.bind(Path(path), place, owners=owners, read_only=True)
        else:
            mounts.bind(Path(path), place, read_only=True)
        names.insert(0, str(place))
    options = f"lowerdir={':'.join(names)}".encode()
    flags = mounts.MS_NODEV | _MS_RDONLY
    mounts.check(mounts.libc.mount(b"overlay", b"merged", b"overlay", flags, options), "merged")
    copied = subprocess.run(["cp", "--archive", "--", "merged/.", f"{target}/"], check=False)
    sys.exit(copied.returncode)
