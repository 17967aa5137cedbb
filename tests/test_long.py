"""What takes longer than scripts/test may: Debian 13, UEFI, cloud-init, many at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hvctl import images
from hvctl.config import Config
from hvctl.host import Host
from hvctl.instances import lifecycle, query
from tests import world
from tests.cli import run

pytestmark = pytest.mark.long


@pytest.fixture
def leaves_nothing(host: Host) -> Iterator[None]:
    """Fails the test when anything but images stays."""
    before = world.look(host)
    yield
    for instance in host.instances():
        lifecycle.delete(host, instance.name)
    assert not [
        line for line in world.differences(before, world.look(host)) if "images/" not in line and "tags/" not in line
    ]


def test_debian_13_boots_and_is_healthy(host: Host, settings: Config, leaves_nothing: None) -> None:
    images.build(host, images.parse_request("debian-13"))
    assert run(settings, "create", "trixie", "--image", "debian-13").status == 0
    done = run(settings, "ssh", "trixie", "--", "cat /etc/debian_version; systemctl is-system-running --wait")
    assert done.out.split()[0].startswith("13")
    assert done.out.split()[1] == "running"
    assert run(settings, "exec", "trixie", "--", "hostname").out == "trixie\n"


def test_a_guest_with_uefi_boots_and_takes_its_variables_along(
    host: Host, settings: Config, debian_image: str, leaves_nothing: None
) -> None:
    made = run(settings, "create", "firm", "--image", debian_image, "--template", "uefi")
    assert made.status == 0, made.err
    assert run(settings, "ssh", "firm", "--", "ls -d /sys/firmware/efi").out == "/sys/firmware/efi\n"
    assert host.store.nvram(query.get(host, "firm").record.uuid).exists()
    assert run(settings, "delete", "--yes", "firm").status == 0


def test_a_nested_guest_has_the_extension(
    host: Host, settings: Config, debian_image: str, leaves_nothing: None
) -> None:
    made = run(settings, "create", "outer", "--image", debian_image, "--template", "nested")
    assert made.status == 0, made.err
    assert run(settings, "ssh", "outer", "--", "grep -cwE 'svm|vmx' /proc/cpuinfo").out == "2\n"


def test_user_data_reaches_cloud_init(host: Host, settings: Config, debian_image: str, leaves_nothing: None) -> None:
    user_data = "#cloud-config\nwrite_files:\n- path: /root/made\n  content: by cloud-init\n"
    made = run(settings, "create", "cloudy", "--image", debian_image, "--user-data", "-", stdin=user_data)
    assert made.status == 0, made.err
    done = run(settings, "ssh", "cloudy", "--", "cloud-init status --wait; cat /root/made; echo; hostname")
    assert "status: done" in done.out
    assert done.out.splitlines()[-1] == "cloudy"
    assert "by cloud-init" in done.out
    seed = host.store.seed(query.get(host, "cloudy").record.uuid)
    assert seed.stat().st_mode & 0o077 == 0


def test_fifty_containers_by_one_command(host: Host, settings: Config, debian_image: str, leaves_nothing: None) -> None:
    names = [f"many-{number}" for number in range(50)]
    made = run(settings, "create", *names, "--container", "--image", debian_image, "--memory", "128M")
    assert made.status == 0, made.err
    for name in names:
        assert run(settings, "ssh", name, "--", "hostname").out == f"{name}\n"
    records = [instance.record for instance in host.instances()]
    assert len(records) == 50
    for part in ("address", "mac", "uuid", "first_id"):
        assert len({getattr(record, part) for record in records}) == 50, part
    assert run(settings, "delete", "--yes", *names).status == 0
    assert host.instances() == []
