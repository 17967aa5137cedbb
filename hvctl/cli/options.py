"""Options of other tools, and what there is here in their place: for the hint that a missing option gets."""

from __future__ import annotations

import difflib

import click

from hvctl.cli.words import CUTOFF, PORTS

_NETWORK = (
    "all are on the one network of `host setup`; on the host's own: hvctl create --container --template host-network"
)
_VOLUME = "a directory of the host's, for a container: --mount SRC:DST; a volume: hvctl disk add"
_FIXED = "that is fixed when it is made: hvctl create"
_ALL = "name them: hvctl list"
_ONE_HOST = "it works on this host; on another: ssh HOST hvctl ..."

_SIZES = {
    **dict.fromkeys(("-m", "--mem", "--ram"), "--memory 2GiB"),
    **dict.fromkeys(("-c", "--cpu", "--vcpus"), "--cpus 2"),
}
_NEW = {
    **_SIZES,
    **dict.fromkeys(("-p", "--publish", "--publish-all", "-P", "--port", "--expose"), PORTS),
    **dict.fromkeys(("-n", "--net", "--network", "--bridge", "--ip", "--dns"), _NETWORK),
    "--volume": _VOLUME,
    "--hostname": "its name is its host name",
}

# From docker and podman, incus and lxc, multipass, vagrant, virsh and virt-install. Below a command's path: option -> what
# to do instead; one that begins with an option is that command's own.
OPTIONS: dict[str, dict[str, str]] = {
    "hvctl": {
        **dict.fromkeys(("-c", "--connect", "-H", "--host", "--remote"), _ONE_HOST),
        **dict.fromkeys(("-v", "--verbose", "--debug", "--json"), "after the command: hvctl list --json -v"),
        **dict.fromkeys(("-V", "-version"), "--version"),
    },
    "hvctl create": {
        **_NEW,
        "--name": "the name stands alone: hvctl create NAME",
        **dict.fromkeys(("-d", "--detach"), "leave it away: it goes on by itself"),
        **dict.fromkeys(("-i", "-t", "--interactive", "--tty"), "a command and its terminal: hvctl run, or hvctl exec"),
        **dict.fromkeys(("--rm", "--ephemeral"), "hvctl run deletes what it made"),
        **dict.fromkeys(("-s", "--storage", "--disk-size", "--size", "--root-size"), "--disk 20G"),
        **dict.fromkeys(("--cloud-init", "--userdata"), "--user-data FILE"),
        "--restart": "--autostart starts it when the host boots",
        **dict.fromkeys(("--type", "--virt-type"), "--container or --vm"),
        **dict.fromkeys(("--config", "--profile", "--xml"), "--template ./mine.xml: hvctl template show"),
        **dict.fromkeys(("--os-variant", "--osinfo"), "leave it away: the image says it"),
        **dict.fromkeys(
            ("--cdrom", "--iso", "--location"), "hvctl disk add NAME cd --iso FILE; images: hvctl image import"
        ),
        **dict.fromkeys(("--device", "--gpus"), "a disk: hvctl disk add; others: hvctl create --template ./mine.xml"),
    },
    "hvctl run": {
        **_NEW,
        **dict.fromkeys(("-d", "--detach"), "what is to stay: hvctl create NAME --image IMAGE"),
        "--rm": "leave it away: it is deleted when its command has ended",
        "-u": "--user USER",
        "--image": "the image stands alone: hvctl run IMAGE -- COMMAND",
    },
    "hvctl set": {
        **_SIZES,
        **dict.fromkeys(("--disk", "--disk-size", "--size"), "hvctl disk resize NAME root SIZE"),
        **dict.fromkeys(("--cpuset", "--processes", "--mount", "--privileged", "--template", "--image"), _FIXED),
        "--volume": "hvctl disk add",
        "--name": "hvctl rename OLD NEW",
        **dict.fromkeys(("-p", "--publish", "--port"), PORTS),
        **dict.fromkeys(("--network", "--net"), _NETWORK),
    },
    "hvctl exec": {
        **dict.fromkeys(("-u", "--user"), "it is root's: hvctl exec NAME -- runuser -u USER -- COMMAND"),
        **dict.fromkeys(("-w", "--workdir", "--cwd"), "hvctl exec NAME -- env -C DIRECTORY COMMAND"),
        **dict.fromkeys(("-e", "--env"), "hvctl exec NAME -- env K=V COMMAND"),
        **dict.fromkeys(("-d", "--detach"), "hvctl exec NAME -- systemd-run COMMAND"),
    },
    "hvctl ssh": {
        "-l": "-u USER",
        **dict.fromkeys(("-L", "-R", "-D"), "it forwards nothing; from elsewhere: ssh -L 8080:ADDRESS:80 HOST"),
        **dict.fromkeys(("-p", "--port"), "it is port 22, at its own address: hvctl list"),
    },
    "hvctl logs": {
        **dict.fromkeys(
            ("-f", "--follow"),
            "it prints what there is; what comes: hvctl exec NAME -- journalctl -f, or hvctl console",
        ),
        "--tail": "-n 50",
        "--since": "hvctl exec NAME -- journalctl --since ...",
    },
    "hvctl delete": {
        **dict.fromkeys(("-a", "--all"), _ALL),
        **dict.fromkeys(
            ("--volumes", "--purge", "--remove-all-storage", "--storage"),
            "leave it away: all that is theirs goes, unless --keep-volumes is said",
        ),
    },
    "hvctl start": {
        **dict.fromkeys(("-a", "--all"), _ALL),
        **dict.fromkeys(("--attach", "--console"), "hvctl console, once it runs"),
    },
    "hvctl stop": {
        **dict.fromkeys(("-a", "--all"), _ALL),
        **dict.fromkeys(("-t", "--time"), "--timeout SECONDS"),
        "-f": "--force kills it",
    },
    "hvctl restart": {
        **dict.fromkeys(("-a", "--all"), _ALL),
        **dict.fromkeys(("-t", "--time"), "--timeout SECONDS"),
        "-f": "--force kills it first",
    },
    "hvctl list": {
        **dict.fromkeys(("-a", "--all", "--inactive"), "leave it away: all are listed, those that are off too"),
        **dict.fromkeys(("-q", "--quiet", "--format", "-f", "--filter", "-o", "--output", "--name"), "--json"),
    },
    "hvctl snapshot take": {
        "--name": "it stands alone: hvctl snapshot take NAME SNAPSHOT",
        **dict.fromkeys(("-m", "--message", "--description"), "--comment TEXT"),
    },
    "hvctl image build": {
        **dict.fromkeys(("-t", "--tag"), "--name NAME"),
        "--no-cache": "leave it away: all steps are done each time",
        "--build-arg": "there is none: write ARG K=V into the Containerfile",
    },
}


def find_advice(error: click.NoSuchOption) -> str:
    """What to type instead of an option that the command has not; its help where nobody can tell."""
    context = error.ctx
    if context is None:
        return "hvctl --help"
    path, option = context.command_path, error.option_name
    if advice := OPTIONS.get(path, {}).get(option):
        return advice
    known = [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]
    word = option.lstrip("-")
    begun = [name for name in known if len(word) > 2 and name[2:].startswith(word)]
    close = difflib.get_close_matches(word, [name[2:] for name in known], n=1, cutoff=CUTOFF)
    if len(begun) == 1 or close:
        return f"did you mean {begun[0] if len(begun) == 1 else f'--{close[0]}'}? {path} --help"
    return f"{path} --help"
