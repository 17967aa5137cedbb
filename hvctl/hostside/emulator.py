"""What libvirt starts instead of `libvirt_lxc` on a host without systemd: it joins the groups that the hook has made.

libvirtd calls it with `libvirt_lxc`'s arguments, `--name NAME` among them (without: it asks for the version), and waits
for that program, which takes its place here (same process, same descriptors). A shell script that starts no program, for
every start waits: Python takes 11 ms for it. Quick and silent; what fails is on stderr, which libvirt shows.
"""

from __future__ import annotations

from hvctl.hostside import groups

PROGRAM = "/usr/local/lib/hvctl/emulator"
"""Where `hvctl host setup` installs it; definitions name this path."""

SCRIPT = f"""#!/bin/sh
# Made by `hvctl host setup`, removed by `hvctl host teardown`. Joins a container's groups, then becomes libvirt's program.
set -eu
name= last=
for word; do
    [ "$last" != --name ] || name=$word
    last=$word
done
if [ -n "$name" ]; then
    trap 'echo "hvctl: the container'"'"'s groups cannot be joined" >&2' EXIT
    while read -r tasks; do
        [ -f "$tasks" ] || exit 1
        echo 0 > "$tasks"
    done < "{groups.NOTES}/$name"
    trap - EXIT
    # For all in it; this itself is spared again once it runs, by the hook. Root may be forbidden to lower it.
    echo {groups.LIKELY_VICTIM} > /proc/self/oom_score_adj 2> /dev/null || :
fi
program=/usr/lib/libvirt/libvirt_lxc
[ -x "$program" ] || program=/usr/libexec/libvirt_lxc
exec "$program" "$@"
"""
