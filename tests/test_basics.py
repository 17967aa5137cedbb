"""Sizes, names, keys, settings: what is taken and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvctl import config, identity
from hvctl.access import keys
from hvctl.errors import InvalidSpec
from hvctl.units import GIB, MIB, format_duration, format_size, parse_size
from tests.payloads import PAYLOADS


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("512M", 512 * MIB),
        ("2GiB", 2 * GIB),
        ("1.5 GiB", GIB + 512 * MIB),
        ("1GB", 10**9),
        ("4096", 4096),
        ("1k", 1024),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "0", "-1G", "1X", "G", "1e9", "10 GiBs", "9999999P", "١G", *PAYLOADS])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidSpec):
        parse_size(text)


def test_sizes_and_durations_for_people() -> None:
    assert [format_size(size) for size in (0, 512, 1536, 512 * MIB, 10 * GIB)] == [
        "0B",
        "512B",
        "1.5KiB",
        "512MiB",
        "10GiB",
    ]
    assert [format_duration(time_s) for time_s in (0.34, 12, 185, 7800, 500000)] == [
        "0.3s",
        "12s",
        "3m05s",
        "2h10m",
        "5d",
    ]


@pytest.mark.parametrize("name", ["a", "web", "web-1", "a" * 63])
def test_names_that_are_labels_are_taken(name: str) -> None:
    assert identity.check_name(name) == name


@pytest.mark.parametrize("name", ["", "1web", "-web", "web-", "Web", "we_b", "wéb", "a" * 64, "web\n", ".", *PAYLOADS])
def test_what_is_no_label_is_refused_as_a_name(name: str) -> None:
    with pytest.raises(InvalidSpec):
        identity.check_name(name)


def test_macs_are_unicast_and_local() -> None:
    for _try in range(100):
        first = int(identity.new_mac()[:2], 16)
        assert (first & 1, first & 2) == (0, 2)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "ssh-ed25519",
        "ssh-ed25519 !!!!",
        "ssh-ed25519 AAAA",
        "ssh-dss AAAAB3NzaC1kc3M=",
        'command="id" ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA==',
        "ssh-rsa AAAAC3NzaC1lZDI1NTE5AAAAIA==",
        *PAYLOADS,
    ],
)
def test_what_is_no_public_key_is_refused(line: str) -> None:
    with pytest.raises(InvalidSpec):
        identity.check_public_key(line)


def test_a_public_key_is_one_line() -> None:
    with pytest.raises(InvalidSpec):
        identity.check_public_key(f"{keys.new_pair().public} a\nssh-ed25519 AAAA b")


def test_the_environment_beats_the_users_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hvctl").mkdir()
    (tmp_path / "hvctl" / "config.toml").write_text('store = "/one"\nnetwork = "mine"\n')
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("HVCTL_NETWORK", raising=False)
    monkeypatch.setenv("HVCTL_STORE", "/two")
    settings = config.load()
    assert (settings.store, settings.network) == (Path("/two"), "mine")


@pytest.mark.parametrize("text", ["nosuch = 1", "store = 5", 'store = "relative"', "not toml", 'network = ""'])
def test_a_bad_setting_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "hvctl").mkdir()
    (tmp_path / "hvctl" / "config.toml").write_text(text)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with pytest.raises(InvalidSpec, match=r"config\.toml"):
        config.load()
