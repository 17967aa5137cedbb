"""What users of other tools type, and what that is called here: for the hint that a missing command gets."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

CUTOFF = 0.75
"""How alike (difflib) what was typed and what there is are, for a guess."""

PORTS = "ports are not published, it has an address of its own: hvctl list; from elsewhere: ssh -L 8080:ADDRESS:80 HOST"

# From docker and podman, incus and lxc, multipass, vagrant, virsh, qm and pct, kcli. Below a group's path: word -> ours.
MEANT: dict[str, dict[str, str]] = {
    "hvctl": {
        **dict.fromkeys(("ls", "ps", "status", "vms", "ip", "domifaddr"), "list"),
        **dict.fromkeys(("info", "inspect", "dominfo", "domstate", "describe"), "show"),
        "dumpxml": "show --xml",
        **dict.fromkeys(("launch", "new", "init", "up"), "create"),
        "define": "create --template",
        **dict.fromkeys(("rm", "undefine", "remove", "purge"), "delete"),
        **dict.fromkeys(("halt", "shutdown", "poweroff", "down"), "stop"),
        "kill": "stop --force",
        "destroy": "stop --force, or: hvctl delete",  # virsh's pulls the plug, others' deletes
        "boot": "start",
        "autostart": "set --autostart",
        "reset": "restart --force",
        "reboot": "restart",
        "wait": "start --wait",
        **dict.fromkeys(("suspend", "freeze"), "pause"),
        **dict.fromkeys(("unpause", "unfreeze", "unsuspend"), "resume"),
        **dict.fromkeys(("shell", "login"), "ssh"),
        "enter": "exec",
        **dict.fromkeys(("attach", "terminal", "vnc", "vncdisplay", "viewer"), "console"),
        **dict.fromkeys(("log", "dmesg"), "logs"),
        **dict.fromkeys(("mv", "move", "domrename"), "rename"),
        **dict.fromkeys(("cp", "clone"), "copy"),
        **dict.fromkeys(("config", "edit", "update", "modify", "setvcpus", "setmem"), "set"),
        **dict.fromkeys(("top", "stats", "df", "du"), "usage"),
        "resize": "disk resize, or: hvctl set",
        **dict.fromkeys(("images", "find"), "image list"),
        "search": "image catalogue",
        **dict.fromkeys(("push", "save"), "image export"),
        "load": "image import",
        "commit": "image publish",
        **{word: f"image {word}" for word in ("build", "export", "import", "prune", "publish", "pull")},
        "rmi": "image delete",
        **dict.fromkeys(("profile", "profiles"), "template"),
        **dict.fromkeys(("volume", "storage", "disks"), "disk"),
        **dict.fromkeys(("snapshots", "snap", "checkpoint"), "snapshot"),
        "restore": "snapshot revert, or: hvctl backup restore",
        **dict.fromkeys(("rollback", "revert", "snapshot-revert"), "snapshot revert"),
        **dict.fromkeys(("snapshot-create", "snapshot-create-as"), "snapshot take"),
        **{f"snapshot-{word}": f"snapshot {word}" for word in ("list", "delete")},
        "diff": "snapshot diff",
        **dict.fromkeys(("managedsave", "hibernate"), "snapshot take --memory"),
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


_FILES = "hvctl exec NAME -- tee PATH < FILE > /dev/null, hvctl exec NAME -- cat PATH > FILE; for good: create --mount SRC:DST"

# What there is no command for. Below a group's path: word -> what to do instead.
NOT_HERE: dict[str, dict[str, str]] = {
    "hvctl": {
        "help": "hvctl --help; of one command: hvctl create --help",
        "version": "hvctl --version",
        **dict.fromkeys(("remote", "cluster", "connect"), "it works on this host; on another: ssh HOST hvctl ..."),
        "migrate": "hvctl backup create, and on the other host hvctl backup restore",
        **dict.fromkeys(("port", "ports", "publish-port", "forward"), PORTS),
        **dict.fromkeys(("network", "networks", "net", "net-list"), "there is one network, made by hvctl host setup"),
        **dict.fromkeys(("file", "files", "transfer", "scp", "sftp", "rsync"), _FILES),
        "mount": "hvctl create NAME --container --mount SRC:DST; of one that is there: hvctl disk add",
        "tag": "an image gets its name when it comes: hvctl image import --name, or hvctl image publish --name",
        **dict.fromkeys(
            ("cloud-init", "provision"), "hvctl create --user-data FILE; hvctl exec NAME -- cloud-init status --wait"
        ),
    },
    "hvctl image": {
        "tag": "an image gets its name when it comes: hvctl image import --name, or hvctl image publish --name",
        "history": "hvctl image show",
    },
}


def find_meant(path: str, word: str, commands: Sequence[str]) -> str:
    """What to type instead of `word`, which is no command of the group `path`; its help where nobody can tell."""
    if ours := MEANT.get(path, {}).get(word):
        return f"hvctl {ours}"
    if advice := NOT_HERE.get(path, {}).get(word):
        return advice
    close = difflib.get_close_matches(word, commands, n=1, cutoff=CUTOFF)
    return f"{path} {close[0]}" if close else f"{path} --help"
