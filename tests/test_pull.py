"""Images from the catalogue and from a simplestreams server: real servers on loopback, real signatures."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hvctl.errors import HvctlError, InvalidSpec, NotFound
from hvctl.events import Event
from hvctl.host import Host
from hvctl.hostside import download
from hvctl.model import Firmware, Provision
from hvctl.rootfs import catalogue, checksums, published
from tests import cli, stores, website
from tests.stores import holds, notes, pull, refuse
from tests.website import Site


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return stores.make(tmp_path)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(download, "_PAUSE_S", 0.001)
    with website.serve() as site:
        yield site


@dataclass(frozen=True)
class Key:
    """A throw-away OpenPGP key."""

    home: Path
    fingerprint: str

    @property
    def public(self) -> bytes:
        return self._gpg(["--armor", "--export"])

    def sign(self, content: bytes, how: str = "--detach-sign") -> bytes:
        return self._gpg([how, "--output", "-"], content)

    def _gpg(self, words: list[str], stdin: bytes = b"") -> bytes:
        command = ["gpg", "--homedir", str(self.home), "--batch", "--quiet", *words]
        return subprocess.run(command, input=stdin, capture_output=True, check=True, timeout=60).stdout


def make_key(home: Path) -> Key:
    home.mkdir(mode=0o700)
    gpg = ["gpg", "--homedir", str(home), "--batch", "--quiet", "--passphrase", ""]
    subprocess.run(
        [*gpg, "--quick-gen-key", "nobody <x@example.org>", "ed25519", "sign", "never"], check=True, timeout=60
    )
    done = subprocess.run(
        [*gpg, "--list-keys", "--with-colons"], capture_output=True, text=True, check=True, timeout=60
    )
    fingerprint = next(line.split(":")[9] for line in done.stdout.splitlines() if line.startswith("fpr:"))
    return Key(home, fingerprint)


@pytest.fixture(scope="module")
def keys() -> Iterator[tuple[Key, Key]]:
    """The publisher's key, and somebody else's."""
    folder = Path(tempfile.mkdtemp(prefix="hvctl-keys-", dir="/tmp"))  # a socket's path is short
    made = make_key(folder / "a"), make_key(folder / "b")
    yield made
    for key in made:
        subprocess.run(["gpgconf", "--homedir", str(key.home), "--kill", "all"], check=False, timeout=60)
    subprocess.run(["rm", "-r", str(folder)], check=True, timeout=60)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return stores.make_disk(tmp_path_factory.mktemp("disk")).read_bytes()


@pytest.fixture
def entry(
    site: Site, disk: bytes, keys: tuple[Key, Key], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, object]:
    """An entry of the user's catalogue, served and signed as it should be; written down by `write`."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    sums = f"{hashlib.sha256(disk).hexdigest()} *disk.img\n".encode()
    site.files |= {
        "/disk.img": disk,
        "/SHA256SUMS": sums,
        "/SHA256SUMS.gpg": keys[0].sign(sums),
        "/key.asc": keys[0].public,
        "/CHECKSUM": keys[0].sign(
            f"# disk.img\nSHA256 (disk.img) = {hashlib.sha256(disk).hexdigest()}\n".encode(), "--clearsign"
        ),
    }
    return {
        "address": site.url("/disk.img"),
        "checksums": "SHA256SUMS",
        "signature": "SHA256SUMS.gpg",
        "fingerprint": keys[0].fingerprint,
        "keys": site.url("/key.asc"),
        "os": "tester",
        "version": "1",
        "user": "tess",
    }


def write(tmp_path: Path, entry: dict[str, object], name: str = "mine") -> None:
    folder = tmp_path / "config" / "hvctl"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f'["{name}"]', *(f"{key} = {json.dumps(value)}" for key, value in entry.items())]
    (folder / "catalogue.toml").write_text("\n".join(lines) + "\n")


def test_a_signed_image_is_pulled_and_verified(
    host: Host, site: Site, entry: dict[str, object], disk: bytes, tmp_path: Path
) -> None:
    write(tmp_path, entry)
    told: list[Event] = []
    image = pull(host, told=told)
    assert (image.os, image.version, image.login_user) == ("tester", "1", "tess")
    assert (image.provision, image.firmware, image.has_tree) == (Provision.NOCLOUD, Firmware.BIOS, False)
    assert image.source == site.url("/disk.img")
    assert image.origin == f"sha256:{hashlib.sha256(disk).hexdigest()}"
    assert holds(host, image, disk, tmp_path)
    assert published.get_image(host, "got").id == image.id
    assert notes(told) == ""
    assert list(host.store.downloads.iterdir()) == []


def test_a_clear_signed_file_of_checksums_will_do(host: Host, entry: dict[str, object], tmp_path: Path) -> None:
    del entry["signature"]
    write(tmp_path, {**entry, "checksums": "CHECKSUM", "clearsigned": True})
    assert pull(host).os == "tester"


def test_what_stands_around_a_clear_signed_message_does_not_count(
    host: Host, site: Site, entry: dict[str, object], tmp_path: Path
) -> None:
    site.files["/disk.img"] += b"more"
    digest = hashlib.sha256(site.files["/disk.img"]).hexdigest()
    site.files["/CHECKSUM"] = f"SHA256 (disk.img) = {digest}\n".encode() + site.files["/CHECKSUM"]
    del entry["signature"]
    write(tmp_path, {**entry, "checksums": "CHECKSUM", "clearsigned": True})
    refuse(host, "is not what it should be")


def test_the_same_again_is_not_fetched_again(host: Host, site: Site, entry: dict[str, object], tmp_path: Path) -> None:
    write(tmp_path, entry)
    told: list[Event] = []
    first, second = pull(host), pull(host, name="again", told=told)
    assert first.id == second.id
    assert len(site.of("/disk.img")) == 1
    assert "here already" in notes(told) and "the same content as got" in notes(told)
    assert published.list_names(host, first.id) == ("again", "got")


def test_a_newer_one_takes_the_name_over(
    host: Host, site: Site, entry: dict[str, object], keys: tuple[Key, Key], tmp_path: Path
) -> None:
    write(tmp_path, entry)
    first = pull(host)
    site.files["/disk.img"] = stores.make_disk(tmp_path, "newer.qcow2").read_bytes()
    sums = f"{hashlib.sha256(site.files['/disk.img']).hexdigest()}  disk.img\n".encode()
    site.files |= {"/SHA256SUMS": sums, "/SHA256SUMS.gpg": keys[0].sign(sums)}
    second = pull(host)
    assert first.id != second.id
    assert published.get_image(host, "got").id == second.id


def test_a_flipped_byte_is_refused_and_forgotten(
    host: Host, site: Site, entry: dict[str, object], tmp_path: Path
) -> None:
    good = site.files["/disk.img"]
    site.files["/disk.img"] = good[:5000] + bytes([good[5000] ^ 1]) + good[5001:]
    write(tmp_path, entry)
    refuse(host, "is not what it should be: its sha256 is")
    site.files["/disk.img"] = good
    pull(host)
    assert [one.range for one in site.of("/disk.img")] == ["", ""]


def test_a_truncated_file_is_refused(host: Host, site: Site, entry: dict[str, object], tmp_path: Path) -> None:
    site.files["/disk.img"] = site.files["/disk.img"][:-1000]
    write(tmp_path, entry)
    refuse(host, "is not what it should be")


def test_changed_checksums_are_refused(host: Host, site: Site, entry: dict[str, object], tmp_path: Path) -> None:
    site.files["/SHA256SUMS"] += b"\n"
    write(tmp_path, entry)
    error = refuse(host, "changed after it was signed")
    assert "--insecure" in error.hint
    assert site.of("/disk.img") == []


def test_another_key_is_refused(
    host: Host, site: Site, entry: dict[str, object], keys: tuple[Key, Key], tmp_path: Path
) -> None:
    site.files["/SHA256SUMS.gpg"] = keys[1].sign(site.files["/SHA256SUMS"])
    write(tmp_path, entry)
    refuse(host, "made by another key")


def test_an_expired_key_is_refused(host: Host, site: Site, entry: dict[str, object], tmp_path: Path) -> None:
    """gpgv calls its signature valid, but not good."""
    home = Path(tempfile.mkdtemp(prefix="hvctl-expired-", dir="/tmp"))
    old = ["--faked-system-time", "20200101T000000", "--batch", "--quiet", "--homedir", str(home), "--passphrase", ""]
    try:
        words = ["gpg", *old, "--quick-gen-key", "old <x@example.org>", "ed25519", "sign", "2d"]
        subprocess.run(words, check=True, capture_output=True, timeout=60)
        sign = ["gpg", *old, "--detach-sign", "--output", "-"]
        done = subprocess.run(sign, input=site.files["/SHA256SUMS"], check=True, capture_output=True, timeout=60)
        key = subprocess.run(["gpg", *old, "--export"], check=True, capture_output=True, timeout=60).stdout
    finally:
        subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], check=False, timeout=60)
        subprocess.run(["rm", "-r", str(home)], check=True, timeout=60)
    (tmp_path / "old.gpg").write_bytes(key)
    site.files["/SHA256SUMS.gpg"] = done.stdout
    del entry["fingerprint"]
    write(tmp_path, {**entry, "keys": str(tmp_path / "old.gpg")})
    refuse(host, "the key has expired")


def test_another_key_ring_does_not_help(
    host: Host, site: Site, entry: dict[str, object], keys: tuple[Key, Key], tmp_path: Path
) -> None:
    """Whoever controls the server can exchange all of it but the fingerprint."""
    site.files |= {
        "/SHA256SUMS.gpg": keys[1].sign(site.files["/SHA256SUMS"]),
        "/key.asc": keys[0].public + keys[1].public,
    }
    write(tmp_path, entry)
    refuse(host, f"is by {keys[1].fingerprint}, not by {keys[0].fingerprint}")


@pytest.mark.parametrize(
    ("path", "content"), [("/SHA256SUMS.gpg", b"nonsense"), ("/SHA256SUMS.gpg", b""), ("/key.asc", b"x")]
)
def test_no_signature_is_no_good_signature(
    host: Host, site: Site, entry: dict[str, object], tmp_path: Path, path: str, content: bytes
) -> None:
    site.files[path] = content
    write(tmp_path, entry)
    refuse(host, "the signature is not good")


def test_a_missing_signature_is_an_error(host: Host, site: Site, entry: dict[str, object], tmp_path: Path) -> None:
    del site.files["/SHA256SUMS.gpg"]
    write(tmp_path, entry)
    refuse(host, "answers 404", kind=NotFound)


def test_without_a_signature_only_on_request_and_it_is_said(
    host: Host, site: Site, entry: dict[str, object], tmp_path: Path
) -> None:
    site.files["/SHA256SUMS.gpg"] = b"nonsense"
    write(tmp_path, entry)
    for name in ("one", "two"):
        told: list[Event] = []
        pull(host, name=name, told=told, is_insecure=True)
        assert "not verified: the signature" in notes(told)


def test_insecure_is_no_leave_for_another_digest(
    host: Host, site: Site, entry: dict[str, object], tmp_path: Path
) -> None:
    site.files["/disk.img"] += b"x"
    write(tmp_path, entry)
    refuse(host, "is not what it should be", is_insecure=True)


def test_unsigned_checksums_are_said_to_be_that(host: Host, entry: dict[str, object], tmp_path: Path) -> None:
    for key in ("signature", "fingerprint", "keys"):
        del entry[key]
    write(tmp_path, entry)
    told: list[Event] = []
    pull(host, told=told)
    assert "are not signed" in notes(told)


def test_unsigned_checksums_over_plain_http_are_nothing(
    host: Host, site: Site, entry: dict[str, object], disk: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", site.address)
    monkeypatch.setenv("no_proxy", "")
    site.files |= {f"http://mirror.example{path}": content for path, content in site.files.items()}
    write(tmp_path, {"address": "http://mirror.example/disk.img", "checksums": "SHA256SUMS"})
    refuse(host, "are not signed, and come over plain http")
    told: list[Event] = []
    pull(host, told=told, is_insecure=True)
    assert "not verified" in notes(told)
    pull(host, name="other", sha256=hashlib.sha256(disk).hexdigest())


def test_checksums_that_do_not_name_the_file_are_refused(
    host: Host, site: Site, entry: dict[str, object], keys: tuple[Key, Key], tmp_path: Path
) -> None:
    sums = b"0" * 64 + b"  other.img\n"
    site.files |= {"/SHA256SUMS": sums, "/SHA256SUMS.gpg": keys[0].sign(sums)}
    write(tmp_path, entry)
    refuse(host, "name no file 'disk.img'")


H256, H512 = "ab" * 32, "cd" * 64


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"{H256}  disk.img\n", f"sha256:{H256}"),
        (f"{H256} *disk.img\n", f"sha256:{H256}"),
        (f"{H256.upper()}  ./disk.img\n", f"sha256:{H256}"),
        (f"# disk.img: 10 bytes\nSHA256 (disk.img) = {H256}\n", f"sha256:{H256}"),
        (f"SHA512 (disk.img) = {H512}\nSHA256 (disk.img) = {H256}\n", f"sha512:{H512}"),
        (f"{H512}\n", f"sha512:{H512}"),
        (f"{H256}  disk-20260101.img\n", f"sha256:{H256}"),
    ],
)
def test_every_format_of_checksums_is_read(text: str, found: str) -> None:
    assert str(checksums.find_digest(text, "disk.img", is_for_one=True)) == found


@pytest.mark.parametrize(
    "text",
    ["", "garbage", f"{H256}  a\n{H256}  b\n", f"{H256[:-1]}  disk.img", f"{H256}  disk.img\n{'00' * 32}  disk.img\n"],
)
def test_unclear_checksums_are_refused(text: str) -> None:
    with pytest.raises(InvalidSpec):
        checksums.find_digest(text, "disk.img", is_for_one=True)


def test_a_single_digest_counts_only_in_a_file_about_one() -> None:
    with pytest.raises(InvalidSpec):
        checksums.find_digest(f"{H256}  other.img\n", "disk.img", is_for_one=False)


def test_the_catalogue_that_comes_with_hvctl_is_sound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    found = {entry.name: entry for entry in catalogue.load()}
    wanted = "debian-12-cloud debian-13-cloud ubuntu-22.04 ubuntu-24.04 rocky-9 alma-9 arch"
    assert set(wanted.split()) <= set(found)
    for name in ("fedora", "alpine", "opensuse"):
        assert any(one.startswith(name) for one in found), name
    for entry in found.values():
        assert entry.address.startswith("https://") and entry.checksums.startswith("https://")
        assert entry.trust in ("signature", "https") and entry.user and entry.os


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = ", "not valid TOML"),
        ("x = 1", "no catalogue"),
        ("[x]\n", "'address'"),
        ('[x]\naddress = "ftp://x/"', "no address"),
        ('[x]\naddress = "x.img"', "no address"),
        ('[x]\naddress = "https://x/"\nsum = "y"', "unknown key 'sum'"),
        ('[x]\naddress = "https://x/"\nfirmware = "coreboot"', "coreboot"),
        ('[x]\naddress = "https://x/"\nformat = "vmdk"', "vmdk"),
        ('[x]\naddress = "https://x/"\nuser = "-x"', "no name of a user"),
        ('[x]\naddress = "https://x/"\nchecksums = "s"\nsignature = "g"', "needs checksums, keys"),
        ('[x]\naddress = "https://x/"\nfingerprint = "12"', "no fingerprint"),
        ('["../x"]\naddress = "https://x/"', "cannot be the name"),
    ],
)
def test_a_catalogue_that_makes_no_sense_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "hvctl").mkdir()
    (tmp_path / "hvctl" / "catalogue.toml").write_text(text)
    with pytest.raises(InvalidSpec, match=words):
        catalogue.load()


def test_an_unknown_name_says_what_there_is(host: Host) -> None:
    assert "ubuntu-24.04" in refuse(host, "no 'ubuntu' in the catalogue", "ubuntu", NotFound).hint
    error = refuse(host, "no 'debian-12' in the catalogue", "debian-12", NotFound)
    assert "image build debian-12" in error.hint and "debian-12-cloud" in error.hint


NAMES = ["../x", "-f", "a\0b", "x" * 300, "a\u202eb", "a/b", "", "A", "a b", "a\nb", "..", ".x"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_never_becomes_a_path(
    host: Host, site: Site, entry: dict[str, object], tmp_path: Path, name: str
) -> None:
    write(tmp_path, entry)
    refuse(host, "cannot be the name", name=name)
    assert site.asked == []


@pytest.mark.parametrize(
    "source", [*NAMES, "images:../x", "images:-f", "images:a\0b", "images:a//b", "images:" + "x" * 300]
)
def test_a_source_never_becomes_a_path(host: Host, source: str) -> None:
    with pytest.raises(HvctlError) as caught:
        pull(host, source)
    assert "\n" not in caught.value.message and "\0" not in caught.value.message


@pytest.fixture
def start(host: Host) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `hvctl WORDS` on the test's store; whatever still runs at the end is killed."""
    started = []

    def start(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "hvctl", *words]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=cli.environment(host.config)
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.apart
@pytest.mark.guest  # no guest, but a process of its own, or seconds
def test_two_processes_download_once(
    start: Callable[..., subprocess.Popen[str]], host: Host, site: Site, entry: dict[str, object], tmp_path: Path
) -> None:
    write(tmp_path, entry)
    site.holds["/disk.img"] = 65536
    first = start("image", "pull", "mine", "--name", "one")
    assert site.is_held.wait(30)
    second = start("image", "pull", "mine", "--name", "two")
    assert second.stderr is not None
    assert "waiting for it" in second.stderr.readline()
    site.go_on.set()
    assert (first.wait(60), second.wait(60)) == (0, 0)
    assert len(site.of("/disk.img")) == 1
    assert published.get_image(host, "one").id == published.get_image(host, "two").id


@pytest.mark.apart
@pytest.mark.guest  # no guest, but a process of its own, or seconds
@pytest.mark.parametrize(("how", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_an_interrupted_pull_goes_on(
    start: Callable[..., subprocess.Popen[str]],
    host: Host,
    site: Site,
    entry: dict[str, object],
    tmp_path: Path,
    how: signal.Signals,
    status: int,
) -> None:
    write(tmp_path, entry)
    site.holds["/disk.img"] = 262144
    first = start("image", "pull", "mine")
    assert site.is_held.wait(30)
    part = host.store.downloads
    cli.wait_for(lambda: first.poll() is not None or any(path.stat().st_size for path in part.glob("*.part")))
    assert first.poll() is None and any(path.stat().st_size for path in part.glob("*.part"))
    first.send_signal(how)
    assert first.wait(30) == status
    site.go_on.set()
    done = start("image", "pull", "mine")
    assert done.wait(60) == 0, done.communicate()[1]
    asked = site.of("/disk.img")
    assert asked[1].range.startswith("bytes=") and asked[1].status == 206
    assert int(asked[1].range[6:-1]) + asked[1].sent_bytes == len(site.files["/disk.img"])
    assert list(part.iterdir()) == []
