"""Finding instances: from libvirt alone, on both drivers."""

from __future__ import annotations

from hvctl import metadata, operation
from hvctl.errors import HvctlError, NotFound, NotManaged, Unsupported, WrongState
from hvctl.host import Host
from hvctl.libvirtapi import domains
from hvctl.model import Endpoint, Instance, Mode, Provision, Record, State


def list_instances(host: Host) -> list[Instance]:
    """All instances by name. Raises HostError unless both drivers answered."""
    return host.instances()


def find(host: Host, name: str) -> Instance | None:
    """The instance of this name on either driver, or None.

    Raises NotManaged when the name is a domain that hvctl did not make, or one of another store. While an instance
    changes its mode both drivers have it: the one that it comes from has the intent, and is given.
    """
    found: Instance | None = None
    for mode in Mode:
        domain = domains.find(host.connection(mode), name)
        if domain is None:
            continue
        listed = domains.describe(domain)
        record = metadata.find(listed.xml)
        if found is not None and (record is None or record.pending is None):
            continue
        if record is None:
            raise NotManaged(
                f"{name!r} is a {mode} that hvctl did not make", hint="hvctl leaves it alone; manage it with virsh"
            )
        if record.store != host.store.root:
            raise NotManaged(
                f"{name!r} belongs to another store, {str(record.store)!r}",
                hint=f"HVCTL_STORE={record.store} hvctl ...",
            )
        found = Instance(record=record, live=listed.live)
    if found is not None:
        return found
    for instance in host.list_renaming():
        if name in (instance.name, operation.arguments_of(instance.record).get("from")):
            return instance
    return None


def get(host: Host, name: str) -> Instance:
    """The instance of this name. Raises NotFound, NotManaged."""
    instance = find(host, name) if name.isprintable() else None  # libvirt's binding takes no NUL
    if instance is None:
        raise NotFound(f"there is no instance {name!r}", hint="see which there are: hvctl list")
    return instance


def refresh(host: Host, record: Record) -> Instance:
    """The instance that has this record, as it lives now; cheaper than `get`. Raises NotFound when it has gone."""
    listed = domains.describe(domains.get(host.connection(record.mode), record.uuid))
    return Instance(record=record, live=listed.live)


def check_is_system(record: Record, *, hint: str) -> None:
    """Raise Unsupported for an application, which cannot be made once more from its record."""
    if record.is_application:
        raise Unsupported(
            f"{record.name!r} runs an application: its words and environment may be secret and are in no record",
            hint=hint,
        )


def check_has_name(instance: Instance, name: str) -> None:
    """Raise WrongState for one that was found by a name it is on its way from: whoever settles it must lock its new one."""
    if instance.name != name:
        raise WrongState(
            f"{name!r} is incomplete: 'rename' to {instance.name!r} was interrupted",
            hint=f"finish it: hvctl rename {name} {instance.name}",
        )


def get_complete(host: Host, name: str) -> Instance:
    """The instance of this name, refused with WrongState when an unfinished change is on it."""
    instance = get(host, name)
    if instance.record.pending is not None:
        verb = instance.record.pending.verb
        if host.is_busy(name) and not host.holds(name):
            raise WrongState(f"{name!r} is being changed right now ({verb})", hint="wait until that has ended")
        raise WrongState(f"{name!r} is incomplete: {verb!r} was interrupted", hint="finish or undo it: hvctl gc")
    return instance


def get_running(host: Host, name: str) -> Instance:
    """The instance of this name, refused with WrongState unless it runs."""
    instance = get_complete(host, name)
    if instance.state is State.RUNNING:
        return instance
    hints = {State.PAUSED: f"hvctl resume {name}"}
    raise WrongState(f"{name!r} is {instance.state}", hint=hints.get(instance.state, f"hvctl start {name}"))


def get_endpoint(host: Host, name: str, *, user: str = "") -> Endpoint:
    """Where and with which host key ssh reaches a running instance."""
    instance = get_running(host, name)
    if instance.record.is_application:
        raise Unsupported(
            f"{name!r} runs one process and no sshd", hint=f"hvctl logs {name}; in a container: hvctl exec {name} -- sh"
        )
    if not instance.record.address:
        raise Unsupported(f"{name!r} has no address of its own", hint=f"hvctl exec {name} -- COMMAND")
    if instance.record.provision is Provision.NONE:
        raise Unsupported(
            f"{name!r} has no key of ours to let us in: its image has no cloud-init",
            hint=f"hvctl exec {name} -- COMMAND",
        )
    return endpoint_of(instance, user=user)


def endpoint_of(instance: Instance, *, user: str = "") -> Endpoint:
    """The way into an instance."""
    record = instance.record
    return Endpoint(
        instance=record.name, address=record.address, user=user or record.login_user, host_key=record.host_key
    )


def get_xml(host: Host, instance: Instance) -> str:
    """libvirt's definition of an instance for its next start."""
    return domains.get_xml(domains.get(host.connection(instance.record.mode), instance.record.uuid))


def find_exit_code(host: Host, instance: Instance) -> int | None:
    """What the process of an application that is off has ended with; None where nobody could tell, or may be told."""
    from hvctl.backends import processes

    if not instance.record.is_application or instance.state not in (State.STOPPED, State.CRASHED):
        return None
    try:
        return processes.read_status(host, instance.record).exit_code
    except HvctlError:
        return None


def read_console(host: Host, instance: Instance, *, lines: int = 0, start: int = 0) -> tuple[str, ...]:
    """The last lines of the boot log (0: all); empty where there is none. Raises HvctlError where it cannot be read.

    `start`: bytes to leave out, of a log that goes on from boot to boot.
    """
    from hvctl.backends import get_backend

    backend = get_backend(instance.record.mode)
    limit_bytes = 1024**2 if lines == 0 else 64 * 1024
    if start and (new_bytes := backend.measure_log(host, instance.record) - start) >= 0:
        limit_bytes = min(limit_bytes, new_bytes)  # else virtlogd has begun a new file
    content = backend.read_log(host, instance.record, limit_bytes=limit_bytes)
    shown = tuple(line.rstrip("\r") for line in content.decode(errors="replace").splitlines() if line.strip())
    return shown[-lines:]
