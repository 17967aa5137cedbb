"""Wrong words: what users of other tools type gets a hint that can be typed, a wrong use one line; a group alone its help."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator

import click
import pytest

from hvctl.cli.main import hvctl
from hvctl.cli.words import MEANT
from hvctl.config import Config
from tests.cli import call, run_bytes

NOBODY = 65534


def commands_below(path: str) -> Iterator[str]:
    """The commands of a group, named by its path."""
    group: click.Command | None = hvctl
    for word in path.split()[1:]:
        assert isinstance(group, click.Group)
        group = group.get_command(click.Context(group), word)
    assert isinstance(group, click.Group)
    yield from group.list_commands(click.Context(group))


def find_command(words: str) -> click.Command:
    """The command that a line begins with; its options must be that command's."""
    command: click.Command = hvctl
    for word in shlex.split(words):
        if word.startswith("-"):
            assert any(word in parameter.opts for parameter in command.params), words
            continue
        assert isinstance(command, click.Group), words
        found = command.get_command(click.Context(command), word)
        assert found is not None, words
        command = found
    return command


@pytest.mark.parametrize("path", MEANT)
def test_others_words_are_none_of_ours_and_mean_what_there_is(path: str) -> None:
    assert set(commands_below(path)).isdisjoint(MEANT[path])
    for line in MEANT[path].values():
        for words in line.split(", or: "):
            assert find_command(words.removeprefix("hvctl ")) is not hvctl


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("ls", "hvctl list"),
        ("kill web", "hvctl stop --force"),
        ("destroy web", "hvctl stop --force, or: hvctl delete"),
        ("autostart web", "hvctl set --autostart"),
        ("disk rm web data", "hvctl disk remove"),
        ("disk detach web data", "hvctl disk remove --keep"),
        ("snapshot create web one", "hvctl snapshot take"),
        ("image rm x", "hvctl image delete"),
        ("backup prune web", "hvctl backup delete --keep"),
        ("creat web", "hvctl create"),
        ("template lst", "hvctl template list"),
        ("host doktor", "hvctl host doctor"),
        ("frobnicate", "hvctl --help"),
        ("disk frobnicate", "hvctl disk --help"),
    ],
)
def test_a_command_that_is_not_there_gets_the_one_that_was_meant(settings: Config, line: str, hint: str) -> None:
    done = call(settings, *line.split())
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith("hvctl: there is no command ") and done.err.endswith(f"; next: {hint}\n")


@pytest.mark.parametrize(
    ("line", "status", "said", "hint"),
    [
        ("convert web", 2, "'--to'. Choose from: vm, container", "hvctl convert --help"),
        ("convert web --to x", 2, "'x' is not one of 'vm', 'container'", "hvctl convert --help"),
        ("exec -u nobody web -- id", 255, "No such option", "hvctl exec --help"),
        ("ssh --nosuch web", 255, "No such option", "hvctl ssh --help"),
        ("run --nosuch debian-12 -- id", 255, "No such option", "hvctl run --help"),
        ("create --vm --container web", 2, "a VM or a container", "leave --vm or --container away"),
    ],
)
def test_a_wrong_use_is_told_in_one_line(settings: Config, line: str, status: int, said: str, hint: str) -> None:
    done = call(settings, *line.split())
    assert (done.status, done.out, done.err.count("\n")) == (status, "", 1)
    assert said in done.err and done.err.endswith(f"; next: {hint}\n")


@pytest.mark.parametrize(
    "line", ["exec nosuch ls -la --nosuch", "ssh nosuch -la", "exec nosuch -- -u", "run nosuch -x"]
)
def test_what_follows_the_name_is_the_commands(settings: Config, line: str) -> None:
    done = call(settings, *line.split())
    assert done.status == 255
    assert "option" not in done.err


@pytest.mark.parametrize("line", ["delete -y --yes -f --force", "image delete -y --yes", "snapshot delete -y --yes"])
def test_deleting_without_a_question_is_said_as_elsewhere(line: str) -> None:
    assert find_command(line).name == "delete"


@pytest.mark.parametrize("line", ["", "image", "host"])
def test_a_group_alone_prints_its_help_and_has_done_nothing(settings: Config, line: str) -> None:
    done = call(settings, *line.split())
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith(f"Usage: {' '.join(['hvctl', *line.split()])} [OPTIONS] COMMAND")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("verb", ["setup", "teardown"])
def test_only_root_is_told_what_would_be_changed_on_the_host(settings: Config, verb: str) -> None:
    done = run_bytes(settings, "host", verb, "--dry-run", as_user=NOBODY)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (8, b"", 1), done.stderr
    assert done.stderr.endswith(f"; next: sudo hvctl host {verb} --dry-run\n".encode())


@pytest.mark.parametrize("verb", ["show", "render", "check"])
@pytest.mark.parametrize(("words", "mode"), [("--container", "container"), ("--vm", "vm"), ("", "vm")])
def test_a_templates_mode_is_said_as_create_says_it(settings: Config, verb: str, words: str, mode: str) -> None:
    done = call(settings, "template", verb, "default", *words.split())
    assert done == call(settings, "template", verb, "default", "--mode", mode)
    assert done.status == 0
