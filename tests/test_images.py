"""What is built and from where: requests, the host's apt, the files for the guest. Nothing is built here."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from hvctl.config import Config
from hvctl.errors import InvalidSpec
from hvctl.host import Host
from hvctl.rootfs import aptconfig, guestfiles
from hvctl.rootfs.aptconfig import Source
from hvctl.rootfs.request import DEFAULT_DISK_BYTES, parse_request
from hvctl.units import GIB, MIB, TIB

MIRROR = "http://mirror.example/debian/"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(Config(store=tmp_path, run=tmp_path))


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration of apt's own, in a directory that may be filled, in place of the machine's."""
    etc = tmp_path / "apt"
    for name in ("sources.list.d", "apt.conf.d", "preferences.d"):
        (etc / name).mkdir(parents=True)
    (tmp_path / "lists").mkdir()
    main = tmp_path / "main.conf"
    main.write_text(
        f'Dir::Etc "{etc}"; Dir::Etc::parts "{etc}/apt.conf.d"; Dir::Etc::main "apt.conf";\n'
        f'Dir::State::lists "{tmp_path}/lists"; Dir::Cache "{tmp_path}/cache";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(main))
    return etc


@pytest.mark.parametrize(("name", "version"), [("debian-12", "12"), ("debian-13", "13"), ("trixie", "13")])
def test_a_name_can_say_the_suite(name: str, version: str) -> None:
    request = parse_request(name)
    assert (request.version, request.packages, request.disk_bytes) == (version, (), DEFAULT_DISK_BYTES)


def test_another_name_needs_a_suite() -> None:
    with pytest.raises(InvalidSpec, match="does not say") as caught:
        parse_request("web-base")
    assert "--suite debian-12" in caught.value.hint
    assert parse_request("web-base", suite="debian-13").suite == "trixie"


@pytest.mark.parametrize("suite", ["debian-11", "sid", "-o", "bookworm main", "../x", "ubuntu"])
def test_an_unknown_suite_is_refused(suite: str) -> None:
    with pytest.raises(InvalidSpec, match="there is no suite"):
        parse_request("web", suite=suite)


@pytest.mark.parametrize("package", ["", "-y", "a,b", "a=1", "a/sid", "./x.deb", "?essential", "a b", "A", "x" * 200])
def test_a_package_is_only_a_name(package: str) -> None:
    with pytest.raises(InvalidSpec, match="not the name of a package"):
        parse_request("debian-12", packages=[package])


def test_packages_are_sorted_and_named_once() -> None:
    assert parse_request("debian-12", packages=["g++", "acl", "g++"]).packages == ("acl", "g++")


@pytest.mark.parametrize("disk_bytes", [0, 1 * GIB, 2 * GIB - 1, 16 * TIB + 1])
def test_an_impossible_disk_is_refused(disk_bytes: int) -> None:
    with pytest.raises(InvalidSpec, match="not possible"):
        parse_request("debian-12", disk_bytes=disk_bytes)


def test_a_disk_is_whole_blocks() -> None:
    assert parse_request("debian-12", disk_bytes=3 * GIB + 17).disk_bytes == 3 * GIB


def test_only_debians_archives_are_taken_from_the_host(host: Host, apt: Path) -> None:
    (apt / "sources.list").write_text(
        "deb https://packages.example.com/apt tool-bookworm main\n"
        f"deb [arch=amd64] {MIRROR} bookworm main contrib non-free\n"
        "deb https://packages.example.com/debian/12/prod bookworm main\n"
        "deb http://mirror.example/debian bookworm-backports main\n"
    )
    (apt / "sources.list.d" / "more.sources").write_text(
        f"Types: deb deb-src\nURIs: {MIRROR}\nSuites: bookworm-updates\nComponents: main\n\n"
        "Types: deb\nURIs: http://security.example/debian-security\nSuites: bookworm-security\nComponents: main\n\n"
        "Types: deb\nURIs: https://node.example/\nSuites: nodistro\nComponents: main\n"
    )
    found = aptconfig.find_sources(host)
    assert {(source.uri, source.suite) for source in found} >= {
        (MIRROR, "bookworm"),
        (MIRROR, "bookworm-updates"),
        ("http://security.example/debian-security/", "bookworm-security"),
    }
    text = aptconfig.format_sources(found, "trixie")
    assert sorted(text.splitlines()) == [
        "deb http://mirror.example/debian/ trixie main",
        "deb http://mirror.example/debian/ trixie-updates main",
        "deb http://security.example/debian-security/ trixie-security main",
    ]


def test_a_mirror_keeps_its_credentials(host: Host, apt: Path) -> None:
    (apt / "sources.list").write_text("deb http://user:secret@mirror.example/debian bookworm main\n")
    text = aptconfig.format_sources(aptconfig.find_sources(host), "bookworm")
    assert text == "deb http://user:secret@mirror.example/debian/ bookworm main\n"


def test_a_host_without_debian_gets_debians_own_addresses(host: Host, apt: Path) -> None:
    (apt / "sources.list").write_text("deb http://archive.ubuntu.example/ubuntu noble main\n")
    assert aptconfig.find_sources(host) == ()
    assert "deb http://deb.debian.org/debian/ bookworm main" in aptconfig.format_sources((), "bookworm")


def test_backports_never_become_the_suite() -> None:
    sources = (Source(uri=MIRROR, suite="bookworm"), Source(uri="http://x/", suite="bookworm-backports"))
    assert aptconfig.format_sources(sources, "bookworm") == f"deb {MIRROR} bookworm main\n"


def test_proxies_and_certificates_are_taken_over_and_nothing_else(host: Host, apt: Path) -> None:
    (apt / "apt.conf").write_text(
        'Acquire::http::Proxy "http://u:p@proxy.example:3128";\n'
        'Acquire::https { CAInfo "/etc/ca.pem"; Proxy "DIRECT"; };\n'
        'APT::Get::Assume-Yes "true";\nDPkg::Post-Invoke { "touch /canary"; };\n'
    )
    lines = aptconfig.format_options(host).splitlines()
    assert 'Acquire::http::Proxy "http://u:p@proxy.example:3128";' in lines
    assert 'Acquire::https::CAInfo "/etc/ca.pem";' in lines
    assert all(line.startswith(("Acquire::http", "Dir::Etc::netrc")) for line in lines)


def test_apt_reads_back_what_was_taken_over(host: Host, apt: Path, tmp_path: Path) -> None:
    (apt / "apt.conf").write_text('Acquire::http::Proxy "http://proxy.example:3128";\n')
    again = tmp_path / "again.conf"
    again.write_text(aptconfig.format_options(host))
    done = subprocess.run(
        ["apt-config", "-c", str(again), "dump", "Acquire::http::Proxy"], capture_output=True, text=True, timeout=30
    )
    assert 'Acquire::http::Proxy "http://proxy.example:3128";' in done.stdout


def entries() -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(guestfiles.pack())) as archive:
        return {entry.name: entry for entry in archive}


def test_guest_files_are_roots_whoever_owns_the_code() -> None:
    found = entries()
    assert {entry.uid for entry in found.values()} == {entry.gid for entry in found.values()} == {0}
    assert found["usr/lib/hvctl/identity"].mode == 0o755
    assert found["etc/initramfs-tools/hooks/hvctl"].mode == 0o755
    assert found["etc/ssh/sshd_config.d/10-hvctl.conf"].mode == 0o644
    assert all(entry.isreg() or entry.isdir() for entry in found.values())


def test_every_guest_script_is_a_valid_shell_script() -> None:
    scripts = [path for path in Path(guestfiles.__file__).parent.glob("guest/**/*") if path.is_file()]
    scripts = [path for path in scripts if path.read_bytes().startswith(b"#!")]
    assert len(scripts) >= 5
    for path in scripts:
        done = subprocess.run(["sh", "-n", "--", str(path)], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr


def test_a_build_without_space_is_refused_before_it_begins(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    from hvctl.errors import HostError
    from hvctl.rootfs import debian

    host.store.building.mkdir()
    monkeypatch.setattr(debian, "_NEEDED_BYTES", 2**62 // MIB * MIB)
    with pytest.raises(HostError, match="are free"):
        debian.build(host, parse_request("debian-12"), lambda event: None)
    assert list(host.store.building.iterdir()) == []
