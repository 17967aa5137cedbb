"""Every change as an operation: claim, intent before effect, undo from the record, one commit point.

A verb is a table of steps. Before a step is done, its name is written to the domain's metadata; what the step owns is
in the record already (UUID, MAC, layers). So the same functions that undo a failure in this process undo, or finish,
what a killed process left (`hvctl gc`, or the same command again): `roll_back` and `roll_forward` know only the record.

    with begin(host, CREATE, record, stub) as operation:      # claim: lock held by the caller, stub defined
        with operation.step("address"): ...                   # the intent is written, then the block runs
        operation.commit("define", xml)                       # from here on a crash is finished, not undone
        with operation.step("copy"): ...
                                                              # the intent is cleared last
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from hvctl import metadata
from hvctl.errors import HvctlError, Interrupted
from hvctl.events import Sink, StepStarted, ignore
from hvctl.host import Host
from hvctl.model import PendingOperation, Record
from hvctl.values import dataclass

log = logging.getLogger(__name__)

Effect = Callable[[Host, Record], None]

CLAIM = "claim"
CLEAR = "clear"


def nothing(_host: Host, _record: Record) -> None:
    """The undo of a step that leaves nothing."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a verb. Both effects take only host and record, and may be done twice."""

    name: str
    undo: Effect = nothing
    """Takes the step back; used while the verb is not committed."""
    redo: Effect = nothing
    """Does the step (again); used once the verb is committed."""


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A kind of change: its steps in order, and which one commits it."""

    name: str
    steps: tuple[Step, ...]
    commit: str
    """The step whose effect commits; CLAIM when the claim itself does (delete)."""
    abandon: Effect | None = None
    """After a roll-back, instead of clearing the intent: removes the claim itself (create's stub)."""
    removes_domain: bool = False
    """Whether the last step takes the domain and the intent with it (delete)."""
    has_committed: Callable[[Host, Record], bool] | None = None
    """Where the commit is one call of libvirt's that cannot carry the intent along (rename): told from what it changed."""
    outcome: Callable[[Record], Record] | None = None
    """The record as the commit makes it, from the one with the intent; given its own result, the same again."""

    def step_names(self) -> tuple[str, ...]:
        """All points at which a crash can come, in order: the claim, the steps, the clearing of the intent."""
        return (CLAIM, *(step.name for step in self.steps), CLEAR)

    def index(self, step: str) -> int:
        return self.step_names().index(step)

    def is_committed(self, host: Host, record: Record) -> bool:
        """Whether what was begun on this record is to be finished rather than undone."""
        assert record.pending is not None
        if self.has_committed is not None:
            return self.has_committed(host, record)
        return self.index(record.pending.step) > self.index(self.commit)


class Operation:
    """A change under way on one instance."""

    def __init__(self, host: Host, verb: Verb, record: Record, domain: Any, events: Sink) -> None:
        self.host = host
        self.verb = verb
        self.record = record
        self.domain = domain
        self._events = events

    @contextlib.contextmanager
    def step(self, name: str, record: Record | None = None) -> Iterator[None]:
        """Write the intent to do this step, with this record where it changes, then let the block do it."""
        self._intend(name, record or self.record)
        yield

    def commit(self, name: str, domain_xml: str, record: Record | None = None, *, is_ours: bool = False) -> None:
        """The step that commits: define this XML, with this record where it changes, its intent already past this step.

        `is_ours`: see `domains.define`.
        """
        from hvctl.libvirtapi import domains

        self._intend(name, self.record)
        after = self.verb.step_names()[self.verb.index(name) + 1]
        committed = _with_step(record or self.record, self.verb, after)
        log.debug("define %s:\n%s", committed.name, domain_xml)
        connection = self.host.connection(committed.mode)
        self.domain = domains.define(connection, metadata.embed(domain_xml, committed), is_ours=is_ours)
        self.record = committed  # not before: a definition that libvirt refuses commits nothing

    def redo_after(self, committed: str) -> None:
        """Do all steps after the one that committed, from the record alone: just as a recovery would."""
        for step in self.verb.steps[self.verb.index(committed) :]:
            with self.step(step.name):
                step.redo(self.host, self.record)

    def clear(self) -> None:
        """Remove the intent: the change is complete."""
        self._tell(CLEAR)
        self.record = replace(self.record, pending=None)
        write_record(self.host, self.domain, self.record)

    def _intend(self, step: str, record: Record) -> None:
        self._tell(step)
        intended = _with_step(record, self.verb, step)
        write_record(self.host, self.domain, intended)
        self.record = intended

    def _tell(self, step: str) -> None:
        self.host.pause(0)
        self._events(StepStarted(self.record.name, self.verb.name, step))


@contextlib.contextmanager
def begin(
    host: Host, verb: Verb, record: Record, claim: Callable[[Record], Any], events: Sink = ignore
) -> Iterator[Operation]:
    """Claim an instance for a change, and take the change back, or leave it to be finished, when the block fails.

    `claim` gets the record with the first step as its intent, makes it durable and returns the domain. The caller holds
    the name's lock. Raises whatever the block raised, the world as before unless the message says otherwise.
    """
    events(StepStarted(record.name, verb.name, CLAIM))
    record = _with_step(record, verb, verb.steps[0].name)
    operation = Operation(host, verb, record, claim(record), events)
    try:
        yield operation
        if not verb.removes_domain:
            operation.clear()
    except BaseException as error:
        _after_failure(operation, error)
        raise


def intend(verb: Verb, **arguments: str) -> PendingOperation:
    """The intent of a verb that needs more than the record to be finished: its arguments are recorded with it."""
    return PendingOperation(verb=verb.name, step="", arguments=tuple(arguments.items()))


def arguments_of(record: Record) -> dict[str, str]:
    """What was recorded with the intent on a record; empty where there is none."""
    return dict(record.pending.arguments) if record.pending else {}


def roll_back(host: Host, verb: Verb, record: Record) -> None:
    """Take back every step that was begun, last first, then the claim. May be done twice."""
    assert record.pending is not None
    reached = verb.index(record.pending.step)
    for step in reversed(verb.steps[:reached]):
        log.debug("undo %s of %s %s", step.name, verb.name, record.name)
        step.undo(host, record)
    (verb.abandon or _clear)(host, record)


def roll_forward(host: Host, verb: Verb, record: Record) -> None:
    """Do every step from the one that was begun on, then clear the intent. May be done twice."""
    assert record.pending is not None
    reached = max(verb.index(record.pending.step), 1)
    record = verb.outcome(record) if verb.outcome is not None else record
    for step in verb.steps[reached - 1 :]:
        log.debug("redo %s of %s %s", step.name, verb.name, record.name)
        step.redo(host, record)
    if not verb.removes_domain:
        _clear(host, record)


def write_record(host: Host, domain: Any, record: Record) -> None:
    """Make the record in libvirt this one."""
    from hvctl.libvirtapi import domains

    domains.set_metadata(domain, metadata.format_element(record), prefix=metadata.PREFIX, uri=metadata.URI)


def _with_step(record: Record, verb: Verb, step: str) -> Record:
    arguments = record.pending.arguments if record.pending else ()
    return replace(record, pending=PendingOperation(verb=verb.name, step=step, arguments=arguments))


def _clear(host: Host, record: Record) -> None:
    from hvctl.libvirtapi import domains

    domain = domains.get(host.connection(record.mode), record.uuid)
    write_record(host, domain, replace(record, pending=None))


def _after_failure(operation: Operation, error: BaseException) -> None:
    """Undo what can be undone. When even that fails, say so on the error that is on its way."""
    record, verb = operation.record, operation.verb
    if record.pending is None or verb.is_committed(operation.host, record):
        _add_hint(error, f"{record.name!r} is left incomplete; finish it: hvctl gc")
        return
    try:
        roll_back(operation.host, verb, record)
    except HvctlError as second:
        log.debug("undo failed: %s", second.message)
        _add_hint(error, f"{record.name!r} is left incomplete ({second.message}); then: hvctl gc")


def _add_hint(error: BaseException, text: str) -> None:
    if isinstance(error, HvctlError) and not isinstance(error, Interrupted):
        error.hint = f"{error.hint}; {text}" if error.hint else text
