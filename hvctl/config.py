"""Settings: the environment over the user's file over the system's file over the defaults.

/etc/hvctl/config.toml, then $XDG_CONFIG_HOME/hvctl/config.toml, then HVCTL_STORE, HVCTL_RUN, HVCTL_NETWORK, ...
(https://specifications.freedesktop.org/basedir-spec/latest/)

store = "/var/lib/hvctl"
run = "/run/hvctl"
network = "hvctl"
image = "debian-12"
backups = "/srv/backups"
simplestreams = "https://images.linuxcontainers.org"
template_folders = ["~/hvctl-templates"]
"""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from hvctl.errors import InvalidSpec
from hvctl.values import dataclass

SYSTEM_FILE = Path("/etc/hvctl/config.toml")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings in force."""

    store: Path = Path("/var/lib/hvctl")
    run: Path = Path("/run/hvctl")
    network: str = "hvctl"
    image: str = "debian-12"
    """What `create` takes without `--image`."""
    backups: str = ""
    """The repository of backups that `backup` takes without `--repo`."""
    vm_uri: str = "qemu:///system"
    container_uri: str = "lxc:///system"
    simplestreams: str = "https://images.linuxcontainers.org"
    """The server of `images:NAME`."""
    template_folders: tuple[Path, ...] = ()
    """Searched before the templates that hvctl brings; each may have `vm/NAME.xml` and `container/NAME.xml`."""


def load() -> Config:
    """The settings in force. Raises InvalidSpec for a file that is no TOML or has an unknown or mistyped setting."""
    config = Config(template_folders=(config_home() / "templates", SYSTEM_FILE.parent / "templates"))
    for file in (SYSTEM_FILE, config_home() / "config.toml"):
        try:
            text = file.read_text()
        except (FileNotFoundError, PermissionError, NotADirectoryError):
            continue
        config = _apply(config, text, file)
    for field in fields(Config):
        value = os.environ.get(f"HVCTL_{field.name.upper()}")
        if value:
            config = _set(
                config, field.name, value.split(":") if field.name == "template_folders" else value, "environment"
            )
    return config


def config_home() -> Path:
    """Where this user's settings and templates are."""
    return _xdg("XDG_CONFIG_HOME", ".config")


def data_home() -> Path:
    """Where hvctl keeps this user's own key pair."""
    return _xdg("XDG_DATA_HOME", ".local/share")


def state_home() -> Path:
    """Where the log file goes."""
    return _xdg("XDG_STATE_HOME", ".local/state")


def _xdg(variable: str, fallback: str) -> Path:
    value = os.environ.get(variable, "")
    base = Path(value) if value.startswith("/") else Path.home() / fallback
    return base / "hvctl"


def _apply(config: Config, text: str, file: Path) -> Config:
    import tomllib

    try:
        settings = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidSpec(f"{file} is not valid TOML: {error}", hint=f"edit {file}") from error
    for name, value in settings.items():
        config = _set(config, name, value, str(file))
    return config


def _set(config: Config, name: str, value: object, source: str) -> Config:
    known = {field.name for field in fields(Config)}
    if name not in known:
        raise InvalidSpec(f"unknown setting {name!r} in {source}", hint=f"known settings: {', '.join(sorted(known))}")
    parsed = _parse(getattr(config, name), value)
    if parsed is not None:
        changed: dict[str, Any] = {name: parsed}
        return replace(config, **changed)
    raise InvalidSpec(f"setting {name!r} in {source} cannot be {value!r}", hint="paths are absolute, names are text")


def _parse(old: object, value: object) -> object | None:
    """The value in the type of the one it replaces, or None when it cannot be that."""
    match old, value:
        case Path(), str(text) if text.startswith(("/", "~")):
            return Path(text).expanduser()
        case str(), str(text) if text and text.isprintable():
            return text
        case tuple(), list(items) if all(isinstance(item, str) for item in items):
            return (*(Path(item).expanduser() for item in items), *old)
    return None
