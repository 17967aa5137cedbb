"""What libvirt starts instead of `libvirt_lxc` on a host without systemd: it makes the groups that nobody else makes.

libvirtd calls it with `libvirt_lxc`'s arguments, `--name NAME` among them (without: it asks for the version), and waits
for that program, which takes its place here (same process, same descriptors). A shell script, for every start waits:
Python takes 11 ms for it, this 6. Quick and silent; what fails is on stderr, which libvirt shows.
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
    trap 'echo "hvctl: the container'"'"'s groups cannot be made" >&2' EXIT
    read -r uuid first_id processes < "{groups.NOTES}/$name"
    while read -r _ tree kind options _; do
        group={groups.find_own("$tree", "$uuid")}
        case $kind,$options, in
        cgroup,*,pids,*)
            mkdir -p "$group"
            echo "$processes" > "$group/pids.max"
            ;;
        cgroup,*,name=systemd,*) # the systemd inside makes its groups here
            mkdir -p "$group"
            chown "$first_id:$first_id" "$group" "$group/cgroup.procs" "$group/tasks"
            ;;
        *) continue ;;
        esac
        echo 0 > "$group/{groups.TASKS}"
    done < /proc/self/mounts
    trap - EXIT
fi
program=/usr/lib/libvirt/libvirt_lxc
[ -x "$program" ] || program=/usr/libexec/libvirt_lxc
exec "$program" "$@"
"""
