"""Application images from registries, OCI layouts and archives, through skopeo: `docker://`, `oci:`, `oci-archive:`,
`docker-archive:`.

skopeo brings them as an OCI layout into the building directory and verifies each blob's digest as it comes; what is in
there is then read with limits, and its layers are unpacked confined (OCI image-spec: image-layout.md, manifest.md,
config.md). The tree is known by the digest of the configuration, which names all of its content.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvctl.errors import CommandFailed, HostError, HvctlError, InvalidSpec, NotFound
from hvctl.events import Event
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.model import Image, Process, Provision
from hvctl.rootfs import application, intake
from hvctl.rootfs.building import Building
from hvctl.rootfs.intake import Layer
from hvctl.rootfs.sources import Wanted
from hvctl.units import GIB, MIB, now
from hvctl.values import dataclass

_TIMEOUT_S = 4 * 3600
_INDEX_LIMIT_BYTES = MIB
_MANIFEST_LIMIT_BYTES = 4 * MIB
_CONFIG_LIMIT_BYTES = 8 * MIB
_MOST_LAYERS = 500
_RESERVE_BYTES = GIB // 4
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})", re.ASCII)
_LAYER = re.compile(
    r"application/vnd\.(oci\.image\.layer\.v1|docker\.image\.rootfs\.diff)\.tar(\+(gzip|zstd)|\.gzip)?", re.ASCII
)
_TAG = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
_WRONG_TAG = ("no descriptor found for reference", "more than one image in oci")  # skopeo's words
_MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
_LOOPBACK = re.compile(r"docker://(localhost|127\.\d{1,3}\.\d{1,3}\.\d{1,3}|\[::1\])(:\d+)?/", re.ASCII)
_POLICIES = ("/etc/containers/policy.json", "~/.config/containers/policy.json")
_ANY = b'{"default": [{"type": "insecureAcceptAnything"}]}\n'

# What skopeo's last line says -> what that means here, and what to do.
_FAILURES: tuple[tuple[str, type[HvctlError], str], ...] = (
    ("manifest unknown", NotFound, "look at its name and tag"),
    ("name unknown", NotFound, "look at its name"),
    ("no such file or directory", NotFound, "look at the path"),
    ("unauthorized", HostError, "log in first: skopeo login REGISTRY"),
    (
        "requested access to the resource is denied",
        HostError,
        "look at its name, or log in first: skopeo login REGISTRY",
    ),
    ("server gave HTTP response to HTTPS client", HostError, "--insecure, if that server is to be trusted"),
    ("certificate", HostError, "install its authority in /etc/docker/certs.d, or --insecure"),
    ("Source image rejected", InvalidSpec, "the policy of this host forbids it: /etc/containers/policy.json"),
    ("no image found in", InvalidSpec, "it is made for another platform; hvctl runs linux/amd64"),
    ("igest did not match", InvalidSpec, "it was damaged or changed on its way; try again, or ask who serves it"),
    ("does not match digest", InvalidSpec, "it was damaged or changed; ask who serves it"),
    ("connection refused", HostError, "is the registry up?"),
    ("no such host", HostError, "look at the registry's name"),
    ("no space left on device", HostError, "free some space: hvctl image list; hvctl gc"),
    ("file too large", HostError, "free some space: hvctl image list; hvctl gc"),
)


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a layout holds for this platform."""

    layers: tuple[Layer, ...]
    config_digest: str
    process: Process


def acquire(work: Building, wanted: Wanted) -> Image:
    """Bring an application image into the building's directory.

    Raises NotFound, HostError when it cannot be had, InvalidSpec when it is not what its digests say, for another
    platform, or refused.
    """
    layout = work.directory / "oci"
    _check_sum(work, wanted)
    work.tell("pulling", 2)
    _copy(work, wanted, layout)
    content = read_layout(work, layout)
    work.tell("unpacking", 40)
    work.host.shell.call(files.make_directory, work.rootfs.parent, 0o700)
    intake.unpack_layers(work.host, content.layers, work.rootfs, events=_swallow, subject=work.name)
    work.host.shell.call(files.remove, layout)
    release = _read_release(work)
    return Image(
        id="",
        name=work.name,
        os=release.get("ID", "application"),
        version=release.get("VERSION_ID", ""),
        architecture="x86_64",
        created_at=now(),
        login_user="root",
        provision=Provision.PROCESS,
        disk=None,
        kernel=None,
        initrd=None,
        has_tree=True,
        tree_digest=content.config_digest,
        process=content.process,
    )


def read_layout(work: Building, layout: Path) -> Content:
    """What the one image in a layout consists of. Raises InvalidSpec for anything that is not as the specification says."""
    try:
        return _read_layout(work, layout)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InvalidSpec(
            f"{work.name!r} is no image as the OCI specification describes it: {error}", hint="ask who made it"
        ) from error


def _swallow(_event: Event) -> None:
    """The progress of single layers says nothing to anybody."""


def _check_sum(work: Building, wanted: Wanted) -> None:
    if not wanted.sha256:
        return
    kind, _, rest = wanted.source.partition(":")
    path = Path(rest.partition(":")[0])
    if not kind.endswith("-archive"):
        raise InvalidSpec(f"{wanted.source!r} is no file that could have a checksum", hint="NAME@sha256:... says which")
    if work.host.shell.call(files.hash_file, path) != wanted.sha256:
        raise InvalidSpec(f"{str(path)!r} has another checksum", hint="get it again, or from elsewhere")


def _copy(work: Building, wanted: Wanted, layout: Path) -> None:
    host, call = work.host, work.host.shell.call
    call(files.make_directory, work.directory / "tmp", 0o700)
    policy = (
        []
        if any(call(files.exists, Path(path).expanduser()) for path in _POLICIES)
        else [work.directory / "policy.json"]
    )
    for path in policy:
        call(files.write_file, path, _ANY, 0o600)
    verify = "false" if wanted.is_insecure or _LOOPBACK.match(wanted.source) else "true"
    room = max(0, call(files.available_bytes, host.store.building) - _RESERVE_BYTES)
    argv = [
        *("prlimit", f"--fsize={room}", "--core=0", "--", "skopeo"),
        *("--override-os=linux", "--override-arch=amd64", f"--tmpdir={work.directory / 'tmp'}"),
        *(f"--policy={path}" for path in policy),
        *("copy", "--quiet", "--retry-times=2", "--remove-signatures", "--dest-oci-accept-uncompressed-layers"),
        *([f"--src-tls-verify={verify}"] if wanted.source.startswith("docker:") else []),
        *("--", wanted.source, f"oci:{layout}:image"),
    ]
    done = host.shell.run(argv, timeout_s=_TIMEOUT_S, check=False)
    if done.status != 0:
        raise _failure(host, wanted.source, done.status, done.stderr)


def _failure(host: Host, source: str, status: int, stderr: str) -> HvctlError:
    """skopeo's last line in our words."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    said = (
        re.sub(r'^time=\S+ level=\w+ msg="(.*)"$', r"\1", lines[-1]).replace('\\"', '"') if lines else "it said nothing"
    )
    message = f"cannot pull {source!r}: {said[:400]}"
    if any(words in said for words in _WRONG_TAG):
        return NotFound(message, hint=_name_tags(host, source))
    for words, kind, hint in _FAILURES:
        if words in said:
            return kind(message, hint=hint)
    hint = f"the same with -v, or: skopeo inspect {shlex.quote(source)}"
    return CommandFailed(message, hint=hint, status=status, stderr=stderr)


def _name_tags(host: Host, source: str) -> str:
    """What can be asked for of a layout: the tags that its index names, where it is one."""
    folder = source.removeprefix("oci:").partition(":")[0]
    try:
        index = json.loads(host.shell.call(files.read_file, Path(folder, "index.json"), limit_bytes=_INDEX_LIMIT_BYTES))
        named = [item.get("annotations") or {} for item in index["manifests"]]
        names = {annotations.get("org.opencontainers.image.ref.name", "") for annotations in named}
        tags = sorted(name for name in names if _TAG.fullmatch(name))
    except (HvctlError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        tags = []
    return f"oci:{folder}:TAG with one of its tags: {', '.join(tags[:20])}" if tags else "look at its tag"


def _read_layout(work: Building, layout: Path) -> Content:
    index = _parse(work, layout / "index.json", _INDEX_LIMIT_BYTES)
    manifests = index["manifests"]
    if len(manifests) != 1 or manifests[0]["mediaType"] not in _MANIFESTS:
        raise ValueError("it holds not one image")
    manifest = _parse(work, _blob(layout, manifests[0]["digest"]), _MANIFEST_LIMIT_BYTES, manifests[0]["digest"])
    digest = str(manifest["config"]["digest"])
    config = _parse(work, _blob(layout, digest), _CONFIG_LIMIT_BYTES, digest)
    if (config.get("os"), config.get("architecture")) != ("linux", "amd64"):
        platform = f"{config.get('os')}/{config.get('architecture')}"
        raise InvalidSpec(f"{work.name!r} is made for {platform[:60]!r}", hint="hvctl runs linux/amd64")
    return Content(
        layers=_list_layers(layout, manifest["layers"], config["rootfs"]["diff_ids"]),
        config_digest=digest,
        process=_parse_process(config.get("config") or {}),
    )


def _list_layers(layout: Path, layers: Sequence[Any], diff_ids: Sequence[Any]) -> tuple[Layer, ...]:
    if len(layers) != len(diff_ids) or len(layers) > _MOST_LAYERS:
        raise ValueError(f"{len(layers)} layers and {len(diff_ids)} digests of their content")
    found = []
    for layer, diff_id in zip(layers, diff_ids, strict=True):
        if not _LAYER.fullmatch(layer["mediaType"]) or not _DIGEST.fullmatch(diff_id):
            raise ValueError(f"a layer of the kind {layer['mediaType'][:100]!r}")
        digest = layer["digest"]
        found.append(Layer(path=_blob(layout, digest), media=layer["mediaType"], digest=digest, diff_id=diff_id))
    return tuple(found)


def _blob(layout: Path, digest: str) -> Path:
    """Where a blob lies; a digest is checked before it becomes a path."""
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise ValueError(f"the digest {digest[:100]!r}")
    return layout / "blobs" / "sha256" / match.group(1)


def _parse(work: Building, path: Path, limit_bytes: int, digest: str = "") -> dict[str, Any]:
    """A JSON object, of this digest where one is said."""
    call = work.host.shell.call
    if digest and call(files.hash_file, path) != digest.removeprefix("sha256:"):
        raise ValueError(f"the content of {digest} is another")
    data = json.loads(call(files.read_file, path, limit_bytes=limit_bytes))
    if not isinstance(data, dict):
        raise ValueError("JSON that is no object")
    return data


def _parse_process(config: dict[str, Any]) -> Process:
    """The `config` of an image's configuration (config.md). Raises ValueError for values of another type."""

    def texts(key: str) -> tuple[str, ...]:
        values = config.get(key) or ()
        if isinstance(values, str) or not all(isinstance(value, str) and "\0" not in value for value in values):
            raise ValueError(f"{key} is no list of texts")
        return tuple(values)

    def text(key: str, default: str = "") -> str:
        value = config.get(key) or default
        if not isinstance(value, str) or "\0" in value:
            raise ValueError(f"{key} is no text")
        return value

    pairs = [value.partition("=") for value in texts("Env")]
    return Process(
        entrypoint=texts("Entrypoint"),
        command=texts("Cmd"),
        environment=tuple((key, value) for key, _, value in pairs if key),
        user=text("User"),
        directory=str(Path("/", text("WorkingDir", "/"))),
        ports=tuple(sorted(port for port in (config.get("ExposedPorts") or {}) if isinstance(port, str))),
        stop_signal=application.parse_signal(text("StopSignal", "SIGTERM")),
    )


def _read_release(work: Building) -> dict[str, str]:
    """The distribution that the tree says it is made of (os-release(5)); empty for none."""
    for name in ("etc/os-release", "usr/lib/os-release"):
        content = intake.read_in_tree(work.host, work.rootfs, name, limit_bytes=64 * 1024)
        if content:
            pairs = re.findall(r'^(ID|VERSION_ID)="?([A-Za-z0-9._-]{1,40})"?$', content.decode(errors="replace"), re.M)
            return dict(pairs)
    return {}
