"""Wrong words: what users of other tools type gets a hint that can be typed, a wrong use one line; a group alone its help."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from hvctl.cli.main import hvctl
from hvctl.cli.options import OPTIONS
from hvctl.cli.words import MEANT, NOT_HERE
from hvctl.config import Config
from hvctl.instances import query
from tests.cli import TIMEOUT_S, Ran, call, environment, run_bytes

NOBODY = 65534
HVCTL = (sys.executable, "-m", "hvctl")
UNBUFFERED = ("", "1")  # the output fails when it is flushed, or at once


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


def check_advice(advice: str, own: click.Command | None = None) -> None:
    """Every command that it names is there, with its options; one that begins it is an option of `own`."""
    for begun in re.findall(r"hvctl ((?:[a-z]+(?: |$|[,;)]))*)", advice):
        words = itertools.takewhile(lambda word: word != "", re.split(r"[ ,;)]", begun))
        command: click.Command = hvctl
        for word in words:
            if not isinstance(command, click.Group):
                break
            found = command.get_command(click.Context(command), word)
            assert found is not None, advice
            command = found
    if own is not None and advice.startswith("-"):
        assert any(advice.split()[0] in parameter.opts for parameter in own.params), advice


@pytest.mark.parametrize("path", NOT_HERE)
def test_what_there_is_no_command_for_has_advice_that_can_be_typed(path: str) -> None:
    assert {*commands_below(path), *MEANT[path]}.isdisjoint(NOT_HERE[path])
    for advice in NOT_HERE[path].values():
        check_advice(advice)


@pytest.mark.parametrize("path", OPTIONS)
def test_others_options_are_none_of_ours_and_mean_what_there_is(path: str) -> None:
    command = find_command(path.removeprefix("hvctl").strip())
    assert {option for parameter in command.params for option in parameter.opts}.isdisjoint(OPTIONS[path])
    for advice in OPTIONS[path].values():
        check_advice(advice, command)


@pytest.mark.parametrize(
    ("line", "status", "option", "hint"),
    [
        ("create web --publish 80:80", 2, "--publish", "ports are not published"),
        ("create web -p 80:80", 2, "-p", "ports are not published"),
        ("create web --volume /a:/b", 2, "--volume", "a directory of the host's, for a container: --mount SRC:DST"),
        ("create web --network=br0", 2, "--network", "all are on the one network of `host setup`"),
        ("create web --mem 2G", 2, "--mem", "--memory 2GiB\n"),
        ("create web --memroy 2G", 2, "--memroy", "did you mean --memory? hvctl create --help\n"),
        ("create web --user-dat x", 2, "--user-dat", "did you mean --user-data? hvctl create --help\n"),
        ("create web --frob", 2, "--frob", "hvctl create --help\n"),
        ("set web --mount /a:/b", 2, "--mount", "that is fixed when it is made: hvctl create\n"),
        ("set web --disk 20G", 2, "--disk", "hvctl disk resize NAME root SIZE\n"),
        ("exec -u nobody web id", 255, "-u", "it is root's: hvctl exec NAME -- runuser -u USER -- COMMAND\n"),
        ("logs -f web", 2, "-f", "it prints what there is; what comes: hvctl exec NAME -- journalctl -f"),
        ("delete --all", 2, "--all", "name them: hvctl list\n"),
        ("--json list", 2, "--json", "after the command: "),
    ],
)
def test_an_option_that_is_not_there_gets_what_was_meant(
    settings: Config, line: str, status: int, option: str, hint: str
) -> None:
    done = call(settings, *line.split())
    assert (done.status, done.out) == (status, "")
    if line.startswith("--json"):
        told = json.loads(done.err)
        assert (told["message"], hint in told["hint"]) == (f"No such option {option!r}", True)
    else:
        assert done.err.startswith(f"hvctl: No such option {option!r}; next: {hint}")


def test_of_docker_it_is_taken_what_asks_for_nothing_else(settings: Config) -> None:
    assert "option" not in call(settings, "exec", "-i", "web", "--", "sh").err
    assert "option" not in call(settings, "exec", "-it", "web", "sh").err


def test_a_user_before_the_name_is_told_to_be_an_option(settings: Config) -> None:
    said = "hvctl: the user is an option, as the name comes alone; next: hvctl ssh -u root web\n"
    assert call(settings, "ssh", "root@web") == Ran(status=255, out="", err=said)


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("ls", "hvctl list"),
        ("push web", "hvctl image export"),
        ("resize web", "hvctl disk resize, or: hvctl set"),
        ("commit web new", "hvctl image publish"),
        ("launch x", "hvctl create"),
        ("version", "hvctl --version"),
        ("help", "hvctl --help; of one command: hvctl create --help"),
        ("remote add x", "it works on this host; on another: ssh HOST hvctl ..."),
        ("carts web", "hvctl --help"),
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
        ("exec -x web -- id", 255, "No such option", "hvctl exec --help"),
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


@pytest.mark.parametrize("unbuffered", UNBUFFERED)
@pytest.mark.parametrize("line", ["template list", "template show default", "image catalogue", "--help"])
def test_output_that_cannot_be_written_is_told_as_that(settings: Config, line: str, unbuffered: str) -> None:
    env = {**environment(settings), "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*HVCTL, *line.split()], stdout=full, stderr=subprocess.PIPE, env=env, timeout=TIMEOUT_S, check=False
        )
    said = b"hvctl: the output could not be written: No space left on device; next: write it to another place\n"
    assert (done.returncode, done.stderr) == (8, said)


@pytest.mark.parametrize("unbuffered", UNBUFFERED)
@pytest.mark.parametrize("line", ["template list", "template show default", "image catalogue --json", "--help"])
def test_that_nobody_reads_on_is_no_failure(settings: Config, line: str, unbuffered: str) -> None:
    env = {**environment(settings), "PYTHONUNBUFFERED": unbuffered}
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as unread:
        done = subprocess.run(
            [*HVCTL, *line.split()], stdout=unread, stderr=subprocess.PIPE, env=env, timeout=TIMEOUT_S, check=False
        )
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_failure_that_nobody_reads_keeps_its_code(settings: Config) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as unread:
        words = [*HVCTL, "template", "show", "nosuch"]
        done = subprocess.run(
            words, stdout=unread, stderr=unread, env=environment(settings), timeout=TIMEOUT_S, check=False
        )
    assert done.returncode == 3


@pytest.mark.parametrize(("verb", "code"), [("list", 70), ("run", 255)])
def test_a_fault_of_hvctls_own_is_told_in_one_line_and_noted(
    settings: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, code: int
) -> None:
    def fail(*_words: object) -> None:
        raise KeyError("what\nnobody expected")

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(query, "list_instances", fail)
    monkeypatch.setattr("hvctl.templates.begin", fail)
    words = (verb, "x") if verb == "run" else (verb,)
    log = tmp_path / "hvctl" / "hvctl.log"
    said = f"hvctl: internal error: KeyError: 'what\\nnobody expected'; next: report it, with {log}\n"
    assert call(settings, *words) == Ran(status=code, out="", err=said)
    assert "Traceback (most recent call last)" in log.read_text() and "in fail" in log.read_text()
    assert json.loads(call(settings, verb, "--json", *words[1:]).err)["error"] == "InternalError"
    shown = call(settings, verb, "-v", *words[1:]).err
    assert "Traceback (most recent call last)" in shown and shown.endswith(said)


@pytest.mark.parametrize("line", ["template show default", "template render uefi"])
def test_xml_is_a_string_in_json(settings: Config, line: str) -> None:
    found = json.loads(call(settings, *line.split(), "--json").out)
    assert found["xml"] == call(settings, *line.split()).out
    assert (found["name"], found["mode"]) == (line.split()[-1], "vm")


@pytest.mark.parametrize("verb", ["ssh", "exec", "run", "console"])
def test_whose_output_is_somebody_elses_has_json_for_failures_alone(settings: Config, verb: str) -> None:
    assert "Print hvctl's own failure as JSON; the output is the command's." in " ".join(
        call(settings, verb, "--help").out.split()
    )
    assert set(json.loads(call(settings, verb, "--json", "web").err)) == {"error", "message", "hint", "code"}
