"""An image of what an instance has become: from a stopped one, or one that is held still for a moment."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from hvctl import operation
from hvctl.backends import get_backend
from hvctl.errors import WrongState
from hvctl.events import Note, Sink, ignore
from hvctl.host import Host
from hvctl.instances.claim import claim_existing
from hvctl.instances.recovery import get_settled
from hvctl.instances.verbs import PUBLISH
from hvctl.model import Image, State
from hvctl.rootfs import building, published
from hvctl.rootfs.published import check_tag
from hvctl.units import now
from hvctl.values import dataclass


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What `publish` is asked for."""

    instance: str
    image: str
    keep_identity: bool = False
    """Whether host keys, machine id and the like stay: every instance of the image then is the same system."""


def publish(host: Host, wanted: Publication, events: Sink = ignore) -> Image:
    """Make an image of an instance and give it its name; the instance goes on as it was.

    A running one is held still while its writable layer is copied. Its other half is made when it is first needed.
    Raises NotFound, WrongState, HostError without space, Unsupported where its identity cannot be removed.
    """
    host.require_root("image publish")
    check_tag(wanted.image)
    with contextlib.ExitStack() as stack:
        stack.enter_context(host.lock(wanted.instance))
        instance = get_settled(host, wanted.instance)
        record, backend = instance.record, get_backend(instance.record.mode)
        if instance.state not in (State.RUNNING, State.PAUSED, State.STOPPED, State.CRASHED):
            raise WrongState(
                f"cannot publish {wanted.instance!r}: it is {instance.state}", hint=f"hvctl start {wanted.instance}"
            )
        image = published.read(host, record.image_id, record.spec.image)
        is_held, is_on = instance.state is State.RUNNING, instance.state in (State.RUNNING, State.PAUSED)
        intent = operation.intend(PUBLISH, is_held="yes" if is_held else "no")
        record = replace(record, pending=intent)
        top = host.store.layer(record.layers[-1])
        with operation.begin(host, PUBLISH, record, claim_existing(host), events) as change:
            with change.step("hold"):
                note = backend.hold(host, record) if is_held else ""
            with change.step("copy"):
                work = stack.enter_context(building.begin(host, wanted.image, events))
                if is_on:  # one that is off stays so: its name is locked, and QEMU would refuse to share its disk
                    top = work.directory / "top"
                    backend.copy_top(host, record, top)
            change.redo_after("copy")
        if note:
            events(Note(wanted.instance, note))
        made = backend.export_root(work, record, image, top, keep_identity=wanted.keep_identity)
        source = f"instance {wanted.instance}"
        return work.publish(replace(made, id="", name=wanted.image, created_at=now(), source=source))
