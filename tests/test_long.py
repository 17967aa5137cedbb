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
from tests.test_snapshots_guest import inside

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


def test_what_firmware_and_tpm_keep_goes_with_snapshots_and_copies(
    host: Host, settings: Config, debian_image: str, leaves_nothing: None
) -> None:
    """One word in three places: a UEFI variable (after its 4 bytes of attributes), an index of the TPM, a file."""
    variable, index = "/sys/firmware/efi/efivars/Probe-0a1b2c3d-0000-4000-8000-000000000001", "0x1500016 -C o"

    def write(word: str) -> None:
        octets = f"printf '\\007\\000\\000\\000{word}' > {variable}"
        inside(
            settings, "firm", f"set -e; printf {word} | tpm2_nvwrite {index} -i -; chattr -i {variable}* || :; {octets}"
        )
        inside(settings, "firm", f"echo {word} > /root/word; sync")

    def read(name: str) -> list[str]:
        return inside(
            settings, name, f"set -e; tpm2_nvread {index} -s 3; echo; cat {variable} | tail -c 3; echo; cat /root/word"
        ).split()

    images.build(host, images.parse_request("with-tools", suite="debian-12", packages=("tpm2-tools",)))
    made = run(settings, "create", "firm", "--image", "with-tools", "--template", "uefi", "--set", "tpm=2.0")
    assert made.status == 0, made.err
    assert host.store.nvram(query.get(host, "firm").record.uuid).exists()
    inside(settings, "firm", f"tpm2_nvdefine {index} -s 3")
    for word, options in (("one", ()), ("two", ("--memory",))):
        write(word)
        assert run(settings, "snapshot", "take", "firm", word, *options).status == 0
    write("six")
    assert run(settings, "copy", "firm", "twin", "--no-start").status == 0
    for word in ("two", "one", "two"):
        assert run(settings, "snapshot", "revert", "firm", word, "--yes", "--force").status == 0
        assert read("firm") == [word] * 3
    assert run(settings, "delete", "--yes", "firm").status == 0
    assert run(settings, "start", "twin").status == 0
    assert read("twin") == ["six"] * 3


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
