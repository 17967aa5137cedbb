"""Every verb that changes an instance, as its table of steps: what is undone before the commit, what is redone after it.

The tables know only effects. The flows (create.py, change.py, ...) do the steps in order; recovery.py finishes or undoes
what was interrupted from the same tables. The crash tests walk VERBS: a verb without a scenario fails them.
"""

from __future__ import annotations

from dataclasses import replace

from hvctl.host import Host
from hvctl.instances import converteffects, diskeffects, effects, snapeffects
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

COPY = replace(CREATE, name="copy")

# What it is restored from lies whole and checked in a directory of the store by then.
RESTORE = replace(
    CREATE,
    name="restore",
    steps=(
        CREATE.steps[0],
        Step(name="image"),  # one that nobody stands on goes by itself: `images.prune`
        *CREATE.steps[1:3],
        Step(name="volumes", undo=diskeffects.discard_all),
        *CREATE.steps[3:],
    ),
)

DELETE = Verb(
    name="delete",
    steps=(
        Step(name="stop", redo=effects.kill),
        Step(name="root", redo=effects.discard_root),
        Step(name="volumes", redo=diskeffects.let_all_go),
        Step(name="files", redo=effects.discard_files),
        Step(name="address", redo=effects.release_address),
        Step(name="undefine", redo=effects.undefine),
    ),
    commit=CLAIM,
    removes_domain=True,
)


def _has_new_name(_host: Host, record: Record) -> bool:
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

# So is it while a backup copies its volumes.
LEND = replace(PUBLISH, name="lend")

DISK_ADD = Verb(
    name="disk-add",
    steps=(
        Step(name="volume", undo=diskeffects.discard_made),
        Step(name="attach", undo=diskeffects.detach),
        Step(name="define"),
        Step(name="copy", redo=effects.write_copy),
    ),
    commit="define",
)

DISK_REMOVE = Verb(
    name="disk-remove",
    steps=(
        Step(name="detach", undo=diskeffects.attach),
        Step(name="define"),
        Step(name="volume", redo=diskeffects.let_go),
        Step(name="copy", redo=effects.write_copy),
    ),
    commit="define",
)

# The record is changed first: a disk cannot shrink, so once it may have grown there is no way back.
DISK_RESIZE = Verb(
    name="disk-resize",
    steps=(
        Step(name="define"),
        Step(name="grow", redo=diskeffects.grow),
        Step(name="copy", redo=effects.write_copy),
    ),
    commit="define",
)

DISK_SET = Verb(
    name="disk-set",
    steps=(
        Step(name="define"),
        Step(name="limit", redo=diskeffects.throttle),
        Step(name="copy", redo=effects.write_copy),
    ),
    commit="define",
)


def _is_taken(host: Host, record: Record) -> bool:
    assert record.pending is not None
    reached, commit = (TAKE.index(step) for step in (record.pending.step, TAKE.commit))
    return reached > commit or (reached == commit and snapeffects.is_taken(host, record))


TAKE = Verb(
    name="snapshot-take",
    steps=(
        Step(name="files", undo=snapeffects.discard_snapshot_files),
        Step(name="layer", undo=snapeffects.discard_new_layer),
        Step(name="freeze", undo=snapeffects.thaw),
        Step(name="fill"),
        Step(name="switch"),
        Step(name="thaw", redo=snapeffects.thaw),
        Step(name="define", redo=snapeffects.agree),
        Step(name="seal", redo=snapeffects.seal),
        Step(name="copy", redo=effects.write_copy),
    ),
    commit="switch",
    abandon=snapeffects.forget_snapshot,
    has_committed=_is_taken,
    outcome=snapeffects.taken,
)

REVERT = Verb(
    name="snapshot-revert",
    steps=(
        Step(name="layer", undo=snapeffects.discard_new_layer),
        Step(name="state", undo=snapeffects.discard_state),
        Step(name="define"),
        Step(name="swap", redo=snapeffects.swap_state),
        Step(name="free", redo=snapeffects.free_old),
        Step(name="copy", redo=effects.write_copy),
    ),
    commit="define",
)

FORGET = Verb(
    name="snapshot-delete",
    steps=(
        Step(name="files", redo=snapeffects.discard_snapshot_files),
        Step(name="free", redo=snapeffects.free_old),
        Step(name="copy", redo=effects.write_copy),
    ),
    commit=CLAIM,
)


def _is_compacted(host: Host, record: Record) -> bool:
    assert record.pending is not None
    reached, commit = (COMPACT.index(step) for step in (record.pending.step, COMPACT.commit))
    return reached > commit or (reached == commit and snapeffects.is_replaced(host, record))


COMPACT = Verb(
    name="compact",
    steps=(
        Step(name="merge", undo=snapeffects.discard_new_layer),
        Step(name="replace"),
        Step(name="define", redo=snapeffects.restack),
        Step(name="free", redo=snapeffects.free_merged),
        Step(name="copy", redo=effects.write_copy),
    ),
    commit="replace",
    has_committed=_is_compacted,
    outcome=snapeffects.compacted,
)

# The record with the intent is that of the mode which is left; it goes with the last step.
CONVERT = Verb(
    name="convert",
    steps=(
        Step(name="stop", undo=converteffects.start_again),
        Step(name="name", undo=converteffects.undefine_new),
        Step(name="keep", undo=converteffects.discard_kept),
        Step(name="files", undo=converteffects.dress_back),
        Step(name="root", undo=converteffects.discard_new_root),
        Step(name="define"),
        Step(name="answer", undo=converteffects.end_new),
        Step(name="shed", redo=converteffects.shed),
        Step(name="volumes", redo=converteffects.let_volumes_go),
        Step(name="seal", redo=converteffects.seal_kept),
        Step(name="free", redo=snapeffects.free_old),
        Step(name="autostart", redo=converteffects.apply_autostart),
        Step(name="copy", redo=converteffects.write_copy),
        Step(name="undefine", redo=effects.undefine),
    ),
    commit="answer",
    removes_domain=True,
)

VERBS = {
    verb.name: verb
    for verb in (
        *(CREATE, COPY, RESTORE, DELETE, RENAME, SET, KERNEL, PUBLISH, LEND),
        *(DISK_ADD, DISK_REMOVE, DISK_RESIZE, DISK_SET),
        *(TAKE, REVERT, FORGET, COMPACT, CONVERT),
    )
}
