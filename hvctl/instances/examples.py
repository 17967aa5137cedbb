"""Templates with example values: what `template render` prints, `template check` checks and the golden files hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from uuid import UUID

from hvctl import metadata, templates
from hvctl.backends import get_backend
from hvctl.host import Host
from hvctl.libvirtapi import schema
from hvctl.model import Artefact, Disk, Image, Mode, Mount, Provision, Record, Spec
from hvctl.units import GIB

IMAGE = Image(
    id="0" * 64,
    name="example-image",
    os="debian",
    version="12",
    architecture="x86_64",
    created_at="2026-01-01T00:00:00Z",
    login_user="root",
    provision=Provision.CREDENTIALS,
    disk=Disk(
        artefact=Artefact(file="disk.qcow2", size_bytes=1, sha256="0" * 64), format="qcow2", virtual_bytes=10 * GIB
    ),
    kernel=Artefact(file="vmlinuz", size_bytes=1, sha256="0" * 64),
    initrd=Artefact(file="initrd", size_bytes=1, sha256="0" * 64),
    kernel_arguments=("root=/dev/vda", "rw", "console=ttyS0"),
    kernel_release="6.1.0-1-cloud-amd64",
    has_tree=True,
)


def make_record(mode: Mode, template: str, store: Path, variables: Mapping[str, str]) -> Record:
    """A record with values that are the same on every machine."""
    mounts = (Mount(source="/srv/data", target="/data"),)
    spec = Spec(
        name="example",
        mode=mode,
        image=IMAGE.name,
        template=template,
        variables=tuple(variables.items()),
        cpuset="0-1",
        mounts=mounts,
    )
    return Record(
        uuid=UUID("00000000-0000-4000-8000-000000000001"),
        spec=spec,
        store=store,
        image_id=IMAGE.id,
        layers=("00000000-0000-4000-8000-000000000002",),
        network="hvctl",
        mac="52:00:00:00:00:01",
        address="10.0.0.2",
        host_key="ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEXAMPLEEXAMPLEEXAMPLEEXAMPLEEXAMPLEEXAMPLEEX",
        authorized_keys=(),
        provision=Provision.PROCESS if template == "application" else Provision.CREDENTIALS,
        **get_backend(mode).example,
        created_at=IMAGE.created_at,
    )


def render_example(host: Host, mode: Mode, name: str, variables: Mapping[str, str]) -> str:
    """The definition that a template gives. Raises what `templates.render` raises."""
    template = templates.get_template(mode, name, host.config.template_folders)
    templates.check_variables(template, variables)
    record = make_record(mode, name, host.store.root, variables)
    backend = get_backend(mode)
    xml = templates.render(template, backend.format_values(host, record, IMAGE), variables)
    return metadata.embed(backend.finish_xml(host, record, IMAGE, xml), record)


def check(host: Host, mode: Mode, name: str, variables: Mapping[str, str]) -> None:
    """Raise InvalidSpec unless the template renders and what it gives is valid for libvirt's schema."""
    schema.check_domain(render_example(host, mode, name, variables))
