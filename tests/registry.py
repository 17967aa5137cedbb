"""A registry of containers' images on loopback: Debian's docker-registry with a directory of its own."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = folder / "config.yml"
    config.write_text(_CONFIG.format(folder=folder, port=port))
    log = (folder / "log").open("wb")
    with subprocess.Popen(["docker-registry", "serve", str(config)], stdout=log, stderr=log) as process:
        try:
            _wait(f"http://127.0.0.1:{port}/v2/", process)
            yield Registry(address=f"localhost:{port}", folder=folder)
        finally:
            process.kill()
            log.close()


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    for _try in range(300):
        assert process.poll() is None, "the registry has ended"
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError("the registry does not answer")
