"""Imported images as instances: a tree that knows nothing of hvctl runs as a container; disks choose their firmware."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from hvctl import images
from hvctl.access import keys
from hvctl.events import Event, Note
from hvctl.host import Host
from hvctl.images import Wanted
from hvctl.instances import enter, lifecycle, query
from hvctl.instances.create import Request, create
from hvctl.model import Firmware, Instance, Mode, Provision, Spec, State
from hvctl.units import GIB, MIB
from tests import cli, cloudimage, stores, tiny, world

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def alike(host: Host, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image of a root tree as small as Alpine's: busybox is its init, and there is nothing else."""
    path = tmp_path_factory.mktemp("tree") / "root.tar.gz"
    path.write_bytes(stores.make_busybox_tree())
    return images.bring(host, Wanted(name="alike", source=str(path))).name


def make(host: Host, name: str, image: str, events: list[Event], **options: object) -> Instance:
    spec = Spec(name=name, mode=Mode.CONTAINER, image=image, cpus=1, memory_bytes=64 * MIB)
    return create(host, Request(spec=spec, **options), events.append)  # type: ignore[arg-type]


def test_a_tree_that_knows_nothing_of_us_runs_as_a_container(host: Host, alike: str) -> None:
    before, told = world.look(host), []
    instance = make(host, "alike", alike, told)
    assert (instance.state, instance.record.provision) == (State.RUNNING, Provision.NONE)
    assert any(isinstance(one, Note) and "enter it by hvctl exec alike" in one.text for one in told)
    done = enter.exec_(host, "alike", ["sh", "-c", "cat; id -u; ls /etc/inittab"], b"in\n")
    assert (done.status, done.stdout) == (0, b"in\n0\n/etc/inittab\n")
    ran = cli.run(host.config, "ssh", "alike", "true")
    assert ran.status == 255 and "no cloud-init" in ran.err and "hvctl exec alike" in ran.err
    assert lifecycle.stop(host, "alike", timeout_s=20)
    assert query.get(host, "alike").state is State.STOPPED
    assert lifecycle.start(host, "alike")
    assert enter.exec_(host, "alike", ["ls", "/was-asked"]).status == 0
    lifecycle.delete(host, "alike")
    assert world.differences(before, world.look(host)) == []


@pytest.mark.apart
@pytest.mark.parametrize("firmware", list(Firmware))
def test_a_disk_gets_the_firmware_that_it_needs(host: Host, tmp_path: Path, firmware: Firmware) -> None:
    name = f"disk-{firmware}"
    images.bring(host, Wanted(name=name, source=str(stores.make_disk(tmp_path)), firmware=firmware, login_user="tess"))
    try:
        instance = create(host, Request(spec=tiny.make_spec(name, image=name), start=False))
        assert instance.record.spec.template == {Firmware.BIOS: "default", Firmware.UEFI: "uefi"}[firmware]
        assert instance.record.login_user == "tess"
        domain = ElementTree.fromstring(query.get_xml(host, instance))
        assert (domain.find("os/loader") is not None) == (firmware is Firmware.UEFI)
        assert domain.find("os/kernel") is None and domain.find("os/boot[@dev='hd']") is not None
        seed = domain.find("devices/disk[serial='seed']")
        assert seed is not None and seed.find("target[@bus='virtio']") is not None
        lifecycle.delete(host, name)
    finally:
        images.delete(host, name)


@pytest.mark.long
def test_a_cloud_image_with_uefi_boots_and_lets_nobody_else_in(host: Host, tmp_path: Path) -> None:
    """The whole way of a distribution's image: seed disk, cloud-init, a pinned host key, a user of its own."""
    image = images.bring(host, Wanted(name="cloud", source=str(cloudimage.build(tmp_path)), firmware=Firmware.UEFI))
    assert image.provision is Provision.NOCLOUD
    spec = Spec(name="cloud", mode=Mode.VM, image="cloud", memory_bytes=768 * MIB, disk_bytes=3 * GIB)
    key = keys.find_public_keys(())
    create(host, Request(spec=spec, authorized_keys=key, timeout_s=600))
    try:
        words = "hostname; test -d /sys/firmware/efi && echo uefi; cloud-init status --wait >/dev/null; "
        words += "cat /run/cloud-init/result.json; df --output=size -m / | tail -1"
        ran = cli.run(host.config, "ssh", "cloud", words)
        assert ran.status == 0, ran.err
        assert ran.out.startswith("cloud\nuefi\n") and '"errors": []' in ran.out and "DataSourceNoCloud" in ran.out, (
            ran.out
        )
        assert int(ran.out.split()[-1]) > 2500, "the root file system did not grow"
    finally:
        lifecycle.delete(host, "cloud")
