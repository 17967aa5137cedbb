"""A registry of containers' images on loopback: Debian's docker-registry with a directory of its own."""

from __future__ import annotations

import contextlib
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests import cli, ports

_CONFIG = """version: 0.1
log: {{level: error}}
storage:
  filesystem: {{rootdirectory: {folder}}}
http: {{addr: "127.0.0.1:{port}"}}
"""


@dataclass(frozen=True)
class Registry:
    """A registry that runs."""

    address: str
    folder: Path

    def push(self, layout: Path, name: str) -> str:
        """Put the image of a layout there; its source for hvctl."""
        target = f"docker://{self.address}/{name}"
        words = ["skopeo", "copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false"]
        subprocess.run([*words, f"oci:{layout}:latest", target], check=True, timeout=60, capture_output=True)
        return target

    def list_blobs(self) -> list[Path]:
        """The files of all blobs, the largest first."""
        found = self.folder.glob("docker/registry/v2/blobs/sha256/*/*/data")
        return sorted(found, key=lambda path: -path.stat().st_size)


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Registry]:
    """Serve from this directory for the block."""
    config = folder / "config.yml"
    with contextlib.ExitStack() as undo:
        log = undo.enter_context((folder / "log").open("wb"))
        with ports.kept() as port:
            config.write_text(_CONFIG.format(folder=folder, port=port))
            command = ["docker-registry", "serve", str(config)]
            process = undo.enter_context(subprocess.Popen(command, stdout=log, stderr=log))
            undo.callback(process.kill)
            _wait(f"http://127.0.0.1:{port}/v2/", process)
        yield Registry(address=f"localhost:{port}", folder=folder)


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    def answers() -> bool:
        assert process.poll() is None, "the registry has ended"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=1):
            return True
        return False

    cli.wait_for(answers)
    assert answers(), "the registry does not answer"
