"""A tree as a tar archive: the same tree gives the same bytes, wherever and whenever."""

from __future__ import annotations

from pathlib import Path

from hvctl.errors import CommandFailed
from hvctl.host import Host
from hvctl.hostside import sandbox
from hvctl.rootfs import confined

# GNU tar; names in their order, no name of ours, no time but that of the content. Holes are written out: which files have
# some is the file system's affair, and tar puts its process number into the names of those.
_TAR = (
    *("tar", "--create", "--format=posix", "--sort=name", "--numeric-owner"),
    *("--xattrs", "--xattrs-include=*", "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime"),
)
# sh has no `pipefail`: what goes wrong is told on stderr.
_HASH = '{ "$@" || echo "tar failed" >&2; } | sha256sum'


def write(host: Host, directory: Path, tree: Path, name: str) -> None:
    """Write the archive of a tree as a file of this name into a directory of our own."""
    words = [*_TAR, f"--file={name}", f"--directory={sandbox.place_input(0)}", "."]
    confined.run_confined(host, directory, words, read_only=[tree], capabilities=sandbox.READ_ANY_OWNER)


def hash_tree(host: Host, tree: Path) -> str:
    """The SHA-256, in hex, of the archive that `write` would write."""
    words = ["sh", "-c", _HASH, "sh", *_TAR, "--file=-", f"--directory={sandbox.WORK}", "."]
    done = confined.run_confined(host, tree, words, capabilities=sandbox.READ_ANY_OWNER)
    if "tar failed" in done.stderr:
        raise CommandFailed(f"cannot read the tree {str(tree)!r}: {done.stderr[-300:]}", stderr=done.stderr)
    return done.text.split()[0]
