"""Fixtures: a host with a store, run directory and network of its own, and instances named after the state they are in."""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvctl.config import Config
from hvctl.host import Host
from hvctl.model import Mode
from tests import campaign, sessions, stores, tiny

LENDER = "HVCTL_TEST_IMAGE_STORE"
LONG_RUN_S = 60
ONE_MODE = pytest.StashKey[list[tuple[str, str, str]]]()


# A shell's background job ignores SIGINT, and so would everything that it starts: tests press Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write the golden files anew; read the diff in review"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `mode` runs in both, unless it is marked `only_mode(Mode.X, reason)`."""
    has_own = any("mode" in str(mark.args[0]) for mark in metafunc.definition.iter_markers("parametrize"))
    if "mode" in metafunc.fixturenames and not has_own:
        only = metafunc.definition.get_closest_marker("only_mode")
        metafunc.parametrize("mode", only.args[:1] if only else list(Mode), ids=str, scope="module")


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the marks that are asked for
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Guests after everything that is quick, so that a mistake shows early."""
    for item in items:
        for mark in item.iter_markers("long_in"):
            params = item.callspec.params if isinstance(item, pytest.Function) else {}
            if {"mode": mark.args[0], **mark.kwargs}.items() <= params.items():
                item.add_marker(pytest.mark.long)
    items.sort(key=lambda item: bool(item.get_closest_marker("guest")))
    marked = [(item, mark) for item in items for mark in item.iter_markers("only_mode")]
    config.stash[ONE_MODE] = sorted({(item.nodeid.split("[")[0], *map(str, mark.args)) for item, mark in marked})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Where the time went; what the fault campaign has done; the tests of one mode only, counted, each with its reason."""
    seconds = defaultdict[str, float](float)
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if isinstance(report, pytest.TestReport):
            seconds[report.nodeid.split("::")[0]] += report.duration
    if sum(seconds.values()) > LONG_RUN_S:
        terminalreporter.section("seconds by module")
        for spent_s, name in sorted(((spent_s, name) for name, spent_s in seconds.items()), reverse=True)[:20]:
            terminalreporter.line(f"{spent_s:7.1f} {name}")
    lines = campaign.tally.lines()
    if lines:
        terminalreporter.section("fault campaign")
        for line in lines:
            terminalreporter.line(line)
    found = config.stash.get(ONE_MODE, [])
    if found:
        terminalreporter.section(f"{len(found)} tests of one mode only")
        for name, mode, reason in found:
            terminalreporter.line(f"{name} ({mode}): {reason}")


@pytest.fixture(scope="session", autouse=True)
def plain_environment() -> Iterator[None]:
    """No colours where nobody sees them; no proxy before the servers on loopback (a build of an image may need it)."""
    patch = pytest.MonkeyPatch()
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        patch.delenv(name, raising=False)
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    for name in ("no_proxy", "NO_PROXY"):
        patch.setenv(name, ",".join(filter(None, (direct, "127.0.0.1", "localhost"))))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def settings() -> Iterator[Config]:
    """Settings for a store, a run directory and a network that only this run uses."""
    with sessions.begin() as made:
        yield made


@pytest.fixture(scope="session")
def users_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home directory of its own, so that no test uses the keys, settings or log of whoever runs it."""
    home = tmp_path_factory.mktemp("home")
    patch = pytest.MonkeyPatch()
    patch.setenv("HOME", str(home))
    patch.delenv("SSH_AUTH_SOCK", raising=False)
    for name in ("XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        patch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.startswith("HVCTL_") and name != LENDER]:
        patch.delenv(name)
    yield home
    patch.undo()


@pytest.fixture(scope="session")
def host(settings: Config, users_home: Path) -> Iterator[Host]:
    """A prepared host: `hvctl host setup` was run on it, and `teardown` is at the end."""
    from hvctl import hostsetup
    from hvctl.instances import lifecycle

    with Host(settings) as prepared:
        hostsetup.setup(prepared)
        sessions.collect()
        yield prepared
        for instance in prepared.instances():
            lifecycle.delete(prepared, instance.name)
        hostsetup.teardown(prepared)


@pytest.fixture(scope="module")
def elsewhere(users_home: Path) -> Iterator[Host]:
    """Another prepared host with an empty store: one that has never seen an image of ours."""
    from hvctl import hostsetup
    from hvctl.instances import lifecycle

    with sessions.begin() as settings, Host(settings) as other:
        hostsetup.setup(other)
        yield other
        for instance in other.instances():
            lifecycle.delete(other, instance.name)
        hostsetup.teardown(other)


@pytest.fixture(scope="session")
def tiny_image(host: Host) -> str:
    """The name of an image that boots nothing but is an image: for everything that needs no guest."""
    return tiny.publish(host, "tiny")


@pytest.fixture(scope="session")
def root_image(host: Host) -> str:
    """The name of one like it that has a Linux root on its disk, and the same as its tree."""
    return tiny.publish_root(host, "tiny-root")


@pytest.fixture(scope="session")
def debian_image(host: Host) -> str:
    """The name of the default image: built once in this run, or that of the store which HVCTL_TEST_IMAGE_STORE names.

    The latter is for machines without a mirror, and for whoever runs one test again and again.
    """
    from hvctl import images

    name = "debian-12"
    lender = os.environ.get(LENDER)
    if not lender:
        return images.build(host, images.parse_request(name)).name
    return stores.lend(Path(lender), host.store, name)
