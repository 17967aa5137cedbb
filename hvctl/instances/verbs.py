"""Every verb that changes an instance, as its table of steps: what is undone before the commit, what is redone after it.

The tables know only effects. The flows (create.py, change.py, ...) do the steps in order; recovery.py finishes or undoes
what was interrupted from the same tables. The crash tests walk VERBS: a verb without a scenario fails them.
"""

from __future__ import annotations

from hvctl.instances import effects
from hvctl.model import Record
from hvctl.operation import CLAIM, Step, Verb, arguments_of

CREATE = Verb(
    name="create",
    steps=(
        Step(name="address", undo=effects.release_address),
        Step(name="files", undo=effects.discard_files),
        Step(name="root", undo=effects.discard_root),
        Step(name="define"),
        Step(name="autostart", redo=effects.apply_autostart),
        Step(name="copy", redo=effects.write_copy),
    ),
    commit="define",
    abandon=effects.undefine,
)

DELETE = Verb(
    name="delete",
    steps=(
        Step(name="stop", redo=effects.kill),
        Step(name="root", redo=effects.discard_root),
        Step(name="files", redo=effects.discard_files),
        Step(name="address", redo=effects.release_address),
        Step(name="undefine", redo=effects.undefine),
    ),
    commit=CLAIM,
    removes_domain=True,
)


def _has_new_name(record: Record) -> bool:
    return record.name == arguments_of(record)["to"]


RENAME = Verb(
    name="rename",
    steps=(
        Step(
            name="address",
            undo=lambda host, record: effects.name_address(host, record, arguments_of(record)["from"]),
            redo=lambda host, record: effects.name_address(host, record, arguments_of(record)["to"]),
        ),
        Step(name="rename", undo=effects.undo_rename, redo=effects.finish_rename),
        Step(name="name", redo=effects.write_name),
        Step(name="autostart", redo=effects.apply_autostart),
        Step(name="copy", redo=effects.write_copy),
    ),
    commit="rename",
    has_committed=_has_new_name,
)

SET = Verb(
    name="set",
    steps=(
        Step(name="define"),
        Step(name="autostart", redo=effects.apply_autostart),
        Step(name="copy", redo=effects.write_copy),
    ),
    commit="define",
)

KERNEL = Verb(
    name="kernel",
    steps=(
        Step(name="fetch", undo=effects.discard_new_kernel),
        Step(name="swap", redo=effects.swap_kernel),
        Step(name="copy", redo=effects.write_copy),
    ),
    commit="fetch",
)

# The instance is only read; what is recorded is that it is held still for a moment.
PUBLISH = Verb(
    name="publish",
    steps=(
        Step(name="hold", undo=effects.release),
        Step(name="copy"),
        Step(name="release", redo=effects.release),
    ),
    commit="copy",
)

VERBS = {verb.name: verb for verb in (CREATE, DELETE, RENAME, SET, KERNEL, PUBLISH)}
