"""What users of other tools type, and what that is called here: for the hint that a missing command gets."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

# From docker and podman, incus and lxc, multipass, vagrant, virsh, qm and pct, kcli. Below a group's path: word -> ours.
MEANT: dict[str, dict[str, str]] = {
    "hvctl": {
        **dict.fromkeys(("ls", "ps", "status", "vms"), "list"),
        **dict.fromkeys(("info", "inspect", "dominfo", "describe"), "show"),
        **dict.fromkeys(("launch", "new", "init", "up"), "create"),
        **dict.fromkeys(("rm", "undefine", "remove", "purge"), "delete"),
        **dict.fromkeys(("halt", "shutdown", "poweroff", "down"), "stop"),
        "kill": "stop --force",
        "destroy": "stop --force, or: hvctl delete",  # virsh's pulls the plug, others' deletes
        "boot": "start",
        "autostart": "set --autostart",
        "reset": "restart --force",
        "reboot": "restart",
        **dict.fromkeys(("suspend", "freeze"), "pause"),
        **dict.fromkeys(("unpause", "unfreeze", "unsuspend"), "resume"),
        **dict.fromkeys(("shell", "login"), "ssh"),
        "enter": "exec",
        **dict.fromkeys(("attach", "terminal"), "console"),
        **dict.fromkeys(("log", "dmesg"), "logs"),
        **dict.fromkeys(("mv", "domrename"), "rename"),
        **dict.fromkeys(("cp", "clone"), "copy"),
        **dict.fromkeys(("config", "edit", "update", "modify", "setvcpus", "setmem"), "set"),
        **dict.fromkeys(("top", "stats", "df", "du"), "usage"),
        **dict.fromkeys(("images", "find"), "image list"),
        **{word: f"image {word}" for word in ("build", "export", "import", "prune", "publish", "pull")},
        "rmi": "image delete",
        **dict.fromkeys(("volume", "storage", "disks"), "disk"),
        **dict.fromkeys(("snapshots", "snap", "checkpoint"), "snapshot"),
        "restore": "snapshot revert, or: hvctl backup restore",
        **dict.fromkeys(("rollback", "revert"), "snapshot revert"),
        **dict.fromkeys(("vzdump", "dump"), "backup create"),
        "setup": "host setup",
        **dict.fromkeys(("doctor", "check"), "host doctor"),
    },
    "hvctl image": {
        **dict.fromkeys(("ls", "images"), "image list"),
        **dict.fromkeys(("rm", "remove"), "image delete"),
        **dict.fromkeys(("info", "inspect"), "image show"),
        **dict.fromkeys(("download", "copy", "fetch"), "image pull"),
        **dict.fromkeys(("save", "push"), "image export"),
        **dict.fromkeys(("load", "add"), "image import"),
        **dict.fromkeys(("search", "find", "catalog"), "image catalogue"),
        "commit": "image publish",
        **dict.fromkeys(("gc", "clean"), "image prune"),
    },
    "hvctl snapshot": {
        **dict.fromkeys(("ls", "tree"), "snapshot list"),
        **dict.fromkeys(("create", "save", "push", "add"), "snapshot take"),
        **dict.fromkeys(("restore", "rollback", "apply", "pop"), "snapshot revert"),
        **dict.fromkeys(("rm", "remove"), "snapshot delete"),
        **dict.fromkeys(("info", "inspect"), "snapshot show"),
    },
    "hvctl disk": {
        "ls": "disk list",
        **dict.fromkeys(("attach", "create", "new"), "disk add"),
        **dict.fromkeys(("detach", "unlink"), "disk remove --keep"),  # there the volume stays
        "rm": "disk remove",
        **dict.fromkeys(("grow", "extend"), "disk resize"),
        "mv": "disk move",
    },
    "hvctl backup": {
        **dict.fromkeys(("ls", "snapshots"), "backup list"),
        **dict.fromkeys(("backup", "run", "take"), "backup create"),
        **dict.fromkeys(("rm", "remove"), "backup delete"),
        **dict.fromkeys(("forget", "prune"), "backup delete --keep"),  # there by a schedule
        "check": "backup verify",
    },
}


def find_meant(path: str, word: str, commands: Sequence[str]) -> str:
    """What to type instead of `word`, which is no command of the group `path`; its help where nobody can tell."""
    if ours := MEANT.get(path, {}).get(word):
        return f"hvctl {ours}"
    close = difflib.get_close_matches(word, commands, n=1)
    return f"{path} {close[0]}" if close else f"{path} --help"
