"""What a failure says to type next is not refused in its turn."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from hvctl import metadata
from hvctl.backends import get_backend
from hvctl.backups.opening import open_repository
from hvctl.errors import HvctlError, InvalidSpec, NotFound, Unsupported, WrongState
from hvctl.host import Host
from hvctl.instances import change, convert, copies, snapshots
from hvctl.instances.examples import make_record
from hvctl.libvirtapi import domains
from hvctl.model import Mode, Mount, Provision, Snapshot, Spec
from tests import stores
from tests.test_manifest import IMAGE

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="what changes the store needs root")


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Host]:
    """A host whose drivers are libvirt's test driver, one for each mode, with no instance."""
    for mode in Mode:
        (tmp_path / f"{mode}.xml").write_text("<node/>")
    uris = {f"{mode}_uri": f"test://{tmp_path}/{mode}.xml" for mode in Mode}
    with Host(replace(stores.make(tmp_path).config, **uris)) as host:
        yield host


def add(host: Host, mode: Mode, provision: Provision = Provision.CREDENTIALS) -> None:
    """An instance `web` that is paused, with a snapshot `first`."""
    snapshot = Snapshot(id=str(uuid4()), name="first", layer=str(uuid4()), mode=mode)
    record = replace(
        make_record(mode, "default", host.store.root, {}), uuid=uuid4(), provision=provision, snapshots=(snapshot,)
    )
    record = replace(record, spec=replace(record.spec, name="web", image="tiny"))
    xml = (
        f"<domain type='test'><name>web</name><uuid>{record.uuid}</uuid><memory>131072</memory>"
        "<os><type>hvm</type></os></domain>"
    )
    domain = domains.define(host.connection(mode), metadata.embed(xml, record))
    domain.create()
    domain.suspend()


@pytest.mark.parametrize("mode", Mode)
def test_a_paused_one_is_resumed_before_it_is_stopped(bare: Host, mode: Mode) -> None:
    add(bare, mode)
    other = next(one for one in Mode if one is not mode)
    for refused in (
        lambda: change.rename(bare, "web", "www"),
        lambda: snapshots.revert(bare, "web", "first"),
        lambda: convert.convert(bare, convert.Request(name="web", mode=other)),
    ):
        with pytest.raises(WrongState, match="paused") as caught:
            refused()
        assert caught.value.hint.startswith("hvctl resume web; hvctl stop web (or hvctl stop web --force)")


@pytest.mark.parametrize("mode", Mode)
def test_what_a_paused_one_is_now_is_compared_by_a_snapshot(bare: Host, mode: Mode) -> None:
    add(bare, mode)
    with pytest.raises(WrongState, match="looked at while it is off alone") as caught:
        snapshots.diff(bare, "web", "first")
    assert caught.value.hint == "hvctl snapshot take web now, then: hvctl snapshot diff web first now"


@pytest.mark.parametrize("mode", Mode)
def test_another_of_an_application_is_made_in_its_mode(bare: Host, mode: Mode) -> None:
    add(bare, mode, Provision.PROCESS)
    with pytest.raises(Unsupported) as caught:
        copies.copy(bare, copies.Request(source="web", name="other"))
    assert caught.value.hint == f"make another: hvctl create other --image tiny --{mode}"


@pytest.mark.parametrize(
    ("source", "target", "said", "hint"),
    [
        ("/srv", "/x/../../etc", "'/etc' holds the container's own system", "--mount /srv/data:/data, or a directory"),
        ("/srv", "//dev", "'/dev' is the container's own", "--mount /srv/data:/data"),
        ("/srv", "/da/../ta", "'/da/../ta' is not the shortest way", "--mount /srv:/ta"),
        ("/no such", "/data", "'/no such' is not there", "mkdir '/no such'"),
    ],
)
def test_a_place_that_is_proposed_for_a_directory_may_be_given(
    bare: Host, source: str, target: str, said: str, hint: str
) -> None:
    mounts = (Mount(source=source, target=target, is_read_only=False, uid=0, gid=0),)
    spec = Spec(name="web", mode=Mode.CONTAINER, image="tiny", cpus=1, memory_bytes=2**27, mounts=mounts)
    with pytest.raises(InvalidSpec, match=said) as caught:
        get_backend(Mode.CONTAINER).check_mounts(bare, spec, IMAGE)
    assert caught.value.hint.startswith(hint)


@pytest.mark.parametrize("text", ["web@2026", "web"])
def test_a_backup_that_is_not_there_is_looked_for_in_that_repository(bare: Host, tmp_path: Path, text: str) -> None:
    repository = open_repository(bare, str(tmp_path / "my backups"))
    with pytest.raises(HvctlError) as refused:
        open_repository(bare, str(tmp_path / "no such" / "place")).make()
    assert shlex.split(refused.value.hint) == ["mkdir", "-p", str(tmp_path / "no such")]
    repository.make()
    with pytest.raises(NotFound) as caught:
        repository.get(text)
    assert shlex.split(caught.value.hint) == ["hvctl", "backup", "list", "--repo", str(tmp_path / "my backups")]
    assert repository.command("list web") == f"hvctl backup list web --repo '{tmp_path}/my backups'"
