"""Downloads from a real server on loopback: resumed, bounded, redirected, stalled, and once for two processes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvctl.config import Config
from hvctl.errors import HostError, HvctlError, InvalidSpec, NotFound, TimedOut
from hvctl.events import Event, Progress
from hvctl.host import Host
from hvctl.hostside import download
from hvctl.rootfs import building, fetch
from hvctl.rootfs.building import Building
from tests import website
from tests.website import Site

BODY = os.urandom(1_000_000)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A store with no more than what a download needs."""
    host = Host(Config(store=tmp_path / "store", run=tmp_path / "run"))
    for path in (
        host.store.root,
        host.store.run,
        host.store.building,
        host.store.tags,
        host.store.images,
        host.store.locks,
    ):
        path.mkdir()
    return host


@pytest.fixture
def told() -> list[Event]:
    return []


@pytest.fixture
def work(host: Host, told: list[Event]) -> Iterator[Building]:
    with building.begin(host, "x", told.append) as work:
        yield work


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(download, "_PAUSE_S", 0.001)
    with website.serve() as site:
        site.files["/disk"] = BODY
        yield site


def get(work: Building, address: str, **options: int) -> fetch.Fetched:
    return fetch.bring(work, address, **options)


def test_a_download_is_what_the_server_has(work: Building, site: Site, told: list[Event]) -> None:
    fetched = get(work, site.url("/disk"))
    assert fetched.path.read_bytes() == BODY
    assert (fetched.size_bytes, fetched.sha256) == (len(BODY), hashlib.sha256(BODY).hexdigest())
    assert fetched.sha512 == hashlib.sha512(BODY).hexdigest()
    assert fetched.path.stat().st_mode & 0o777 == 0o600
    assert Progress("x", "downloading", len(BODY), len(BODY), is_bytes=True) in told


def test_a_broken_download_goes_on_where_it_ended(work: Building, site: Site) -> None:
    site.cuts["/disk"] = [300_000, 400_000]
    assert get(work, site.url("/disk")).path.read_bytes() == BODY
    assert [one.range for one in site.asked] == ["", "bytes=300000-", "bytes=700000-"]
    assert sum(one.sent_bytes for one in site.asked) == len(BODY)


def test_the_next_process_goes_on_where_the_last_one_ended(host: Host, site: Site) -> None:
    site.cuts["/disk"] = [100_000, 0, 0, 0, 0]
    with (
        building.begin(host, "x", lambda _event: None) as work,
        pytest.raises(HostError, match="connection ended after"),
    ):
        get(work, site.url("/disk"))
    site.cuts.clear()
    with building.begin(host, "y", lambda _event: None) as work:
        assert get(work, site.url("/disk")).path.read_bytes() == BODY
    assert site.asked[-1].range == "bytes=100000-"
    assert sum(one.sent_bytes for one in site.asked) == len(BODY)


def test_a_whole_download_is_not_fetched_again(work: Building, site: Site) -> None:
    get(work, site.url("/disk"))
    assert get(work, site.url("/disk")).path.read_bytes() == BODY
    assert [one.status for one in site.asked] == [200, 416]


def test_another_version_is_fetched_from_its_beginning(work: Building, site: Site) -> None:
    site.cuts["/disk"] = [300_000]
    site.failures = []
    newer = os.urandom(900_000)
    site.files["/disk"] = BODY

    def replace(done: int, _total: int) -> None:
        if done >= 200_000:
            site.files["/disk"] = newer

    transfer = download.Transfer(site.url("/disk"), work.directory / "x.part", 10**9, 5)
    received = download.fetch(transfer, replace, work.host.pause)
    assert received.sha256 == hashlib.sha256(newer).hexdigest()
    assert transfer.path.read_bytes() == newer
    assert [one.status for one in site.asked] == [200, 200]


@pytest.mark.parametrize("lack", ["has_ranges", "has_tags"])
def test_a_server_that_cannot_go_on_starts_over(work: Building, site: Site, lack: str) -> None:
    setattr(site, lack, False)
    site.cuts["/disk"] = [300_000]
    assert get(work, site.url("/disk")).path.read_bytes() == BODY
    assert [one.status for one in site.asked] == [200, 200]


def test_another_part_than_was_asked_for_is_not_taken(work: Building, site: Site) -> None:
    site.has_odd_ranges = True
    site.cuts["/disk"] = [300_000]
    assert get(work, site.url("/disk")).path.read_bytes() == BODY
    assert [one.status for one in site.asked] == [200, 206, 200]


def test_a_server_that_does_not_say_the_length_is_believed_at_its_end(work: Building, site: Site) -> None:
    site.has_length = False
    assert get(work, site.url("/disk")).path.read_bytes() == BODY


def test_a_server_that_fails_for_a_moment_is_asked_again(work: Building, site: Site) -> None:
    site.failures = [503, 500]
    assert get(work, site.url("/disk")).path.read_bytes() == BODY


def test_a_server_that_fails_on_is_named_with_its_answer(work: Building, site: Site) -> None:
    site.failures = [503] * 10
    with pytest.raises(HostError, match="answers 503") as caught:
        get(work, site.url("/disk"))
    assert site.url("/disk") in caught.value.message
    assert len(site.asked) == 4


def test_what_is_not_there_is_not_asked_for_again(work: Building, site: Site) -> None:
    with pytest.raises(NotFound, match="answers 404"):
        get(work, site.url("/other"))
    assert len(site.asked) == 1


def test_a_forbidden_address_is_not_asked_for_again(work: Building, site: Site) -> None:
    site.failures = [403]
    with pytest.raises(InvalidSpec, match="answers 403"):
        get(work, site.url("/disk"))
    assert len(site.asked) == 1


def test_a_stalled_server_is_left(work: Building, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.cuts["/disk"] = [65536, 0, 0, 0, 0]
    with pytest.raises(HostError, match="connection ended after"):
        get(work, site.url("/disk"))
    site.cuts.clear()
    site.holds["/disk"] = 65536  # nothing more comes, however long that takes
    monkeypatch.setattr(fetch, "STALL_S", 0.2)
    with pytest.raises(TimedOut, match=r"sent nothing for 0\.2 s") as caught:
        get(work, site.url("/disk"))
    assert "what came so far is kept" in caught.value.hint
    assert (work.host.store.downloads / f"{fetch._key(site.url('/disk'))}.part").stat().st_size == 65536


def test_nobody_there_is_said(work: Building, site: Site) -> None:
    with pytest.raises(HostError, match="Connection refused"):
        get(work, "http://127.0.0.1:1/disk")


def test_more_than_was_asked_for_is_not_taken(work: Building, site: Site) -> None:
    site.has_length = False
    with pytest.raises(InvalidSpec, match="larger than 1000 bytes"):
        get(work, site.url("/disk"), limit_bytes=1000)
    assert list(work.host.store.downloads.iterdir()) == []


def test_too_much_is_refused_before_it_comes(work: Building, site: Site) -> None:
    with pytest.raises(InvalidSpec, match="larger than"):
        get(work, site.url("/disk"), limit_bytes=len(BODY) - 1)
    site.files["/text"] = b"x" * 100
    with pytest.raises(InvalidSpec, match="larger than"):
        fetch.read(work, site.url("/text"), limit_bytes=99)
    assert fetch.read(work, site.url("/text"), limit_bytes=100) == b"x" * 100


def test_a_redirect_within_the_scheme_is_followed(work: Building, site: Site) -> None:
    site.redirects["/latest"] = "/disk"
    assert get(work, site.url("/latest")).path.read_bytes() == BODY


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://x/", "data:,x", "http://u:p@127.0.0.1/disk"]
)
def test_a_redirect_to_another_scheme_is_refused(work: Building, site: Site, target: str) -> None:
    site.redirects["/latest"] = target
    with pytest.raises(InvalidSpec, match="sends us on to"):
        get(work, site.url("/latest"))
    assert len(site.asked) == 1


def test_redirects_in_a_circle_end(work: Building, site: Site) -> None:
    site.redirects |= {"/a": "/b", "/b": "/a"}
    with pytest.raises(HvctlError, match="answers 302"):
        get(work, site.url("/a"))
    assert len(site.asked) < 15


@pytest.fixture
def secure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    certificate, key = website.make_certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with website.serve((certificate, key)) as site:
        site.files["/disk"] = BODY
        yield site


def test_https_may_be_redirected_to_and_not_from(work: Building, site: Site, secure: Site) -> None:
    site.redirects["/up"] = secure.url("/disk")
    assert get(work, site.url("/up")).path.read_bytes() == BODY
    secure.redirects["/down"] = site.url("/disk")
    with pytest.raises(InvalidSpec, match="from https to"):
        get(work, secure.url("/down"))


def test_a_certificate_that_nobody_vouches_for_is_refused(
    work: Building, secure: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(InvalidSpec, match="certificate is not valid"):
        get(work, secure.url("/disk"))
    assert secure.asked == []


def test_a_proxy_of_the_environment_is_used(work: Building, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", site.address)
    monkeypatch.setenv("no_proxy", "")
    site.files["http://mirror.example/disk"] = b"through the proxy"
    assert get(work, "http://mirror.example/disk").path.read_bytes() == b"through the proxy"


@pytest.mark.parametrize(
    "address",
    ["http://user:secret@127.0.0.1/x", "http:///x", "http://", "http://a b/", "http://x/\n", "http://x/\0", "http://ü/",
     "http://x/" + "a" * 3000],
)  # fmt: skip
def test_an_odd_address_is_refused_before_anything(work: Building, address: str) -> None:
    with pytest.raises(InvalidSpec, match="cannot fetch"):
        get(work, address)


def test_a_file_is_taken_where_it_lies(work: Building, tmp_path: Path) -> None:
    file = tmp_path / "a disk"
    file.write_bytes(BODY)
    fetched = get(work, "file://" + str(file).replace(" ", "%20"))
    assert (fetched.path, fetched.sha256) == (file, hashlib.sha256(BODY).hexdigest())
    fetch.forget(work, fetched)
    assert file.exists()


def test_a_forged_partial_file_is_no_way_in(work: Building, site: Site) -> None:
    """Notes on another address, or a link in the place of the file, are not used."""
    get(work, site.url("/disk"))
    path = work.host.store.downloads / f"{fetch._key(site.url('/disk'))}.part"
    path.with_suffix(".json").write_text('{"address": "http://elsewhere/", "validator": "x"}')
    assert get(work, site.url("/disk")).path.read_bytes() == BODY
    victim = work.directory / "victim"
    victim.write_bytes(b"keep")
    path.unlink()
    path.symlink_to(victim)
    with pytest.raises(HostError):
        get(work, site.url("/disk"))
    assert victim.read_bytes() == b"keep"


def test_only_old_and_idle_downloads_are_collected(host: Host, site: Site) -> None:
    with building.begin(host, "x", lambda _event: None) as work:
        fetch.take_turn(work, site.url("/disk"))
        get(work, site.url("/disk"))
        assert fetch.collect(host, dry_run=False, at_once=True) == []
    part = next(host.store.downloads.glob("*.part"))
    assert fetch.collect(host, dry_run=False, at_once=False) == []
    os.utime(part, (1, 1))
    assert len(fetch.collect(host, dry_run=True, at_once=False)) == 1
    assert part.exists()
    assert len(fetch.collect(host, dry_run=False, at_once=False)) == 1
    assert list(host.store.downloads.iterdir()) == []
