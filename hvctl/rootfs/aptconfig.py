"""What a build takes over from the host's apt: where Debian comes from, and how to get there. Nothing else.

apt itself is asked (`apt-get indextargets`, `apt-config dump`), so that one-line and deb822 sources, mirror lists,
proxies and credentials work as they do for the host. Both results may hold passwords: they go into private files, never
on a command line, and nothing of them stays in an image.
"""

from __future__ import annotations

import re

from hvctl.host import Host
from hvctl.values import dataclass

_TIMEOUT_S = 30
_DEBIAN = "http://deb.debian.org/debian/"
_SECURITY = "http://deb.debian.org/debian-security/"

_FORMAT = "$(REPO_URI)\t$(RELEASE)\t$(COMPONENT)\t$(LABEL)"
_SUITE = re.compile(r"(?P<base>[a-z]+)(?P<kind>|-updates|-security|/updates|-backports[a-z-]*)", re.ASCII)
_CODE_NAME = re.compile("buster|bullseye|bookworm|trixie|forky|sid|(?:old){0,2}stable|testing|unstable")
# How apt reaches a mirror: proxies, certificates, credentials' files. Not what it does with packages.
_WAY = re.compile(
    r"Acquire::(?:(?:http|https|ftp|tor)(?:::|\s)|Retries\b|ForceIPv[46]\b|Queue-Mode\b)"
    r"|Dir::Etc::netrc(?:parts)?\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One archive that the host's apt uses."""

    uri: str
    suite: str


def find_sources(host: Host) -> tuple[Source, ...]:
    """The host's archives that are Debian's own, in its order; empty on a host that has none."""
    # Labels are known for archives whose lists were fetched; only without them apt names the others as well.
    labels = {(uri, suite): label for uri, suite, label in _list_targets(host)}
    found = []
    for uri, suite, _label in _list_targets(host, "--no-release-info"):
        match = _SUITE.fullmatch(suite)
        if match and _CODE_NAME.fullmatch(match["base"]) and _is_debian(uri, labels.get((uri, suite))):
            found.append(Source(uri=uri, suite=suite))
    return tuple(dict.fromkeys(found))


def format_sources(sources: tuple[Source, ...], suite: str) -> str:
    """One-line sources for a suite: the same archives as the host's, updates and security where the host has them.

    Debian's own addresses when the host has no Debian archive at all.
    """
    wanted: list[tuple[str, str]] = []
    for source in sources:
        match = _SUITE.fullmatch(source.suite)
        kind = match["kind"] if match else ""
        if not kind.startswith("-backports"):
            # "/updates" is how security was called up to Debian 10.
            wanted.append((source.uri, suite + kind.replace("/updates", "-security")))
    if not any(name == suite for _uri, name in wanted):
        wanted = [(_DEBIAN, suite), (_DEBIAN, f"{suite}-updates"), (_SECURITY, f"{suite}-security")]
    return "".join(f"deb {uri} {name} main\n" for uri, name in dict.fromkeys(wanted))


def format_options(host: Host) -> str:
    """The host's settings about reaching mirrors, as an apt.conf file."""
    done = host.shell.run(["apt-config", "dump", "--format", '%F "%v";%n'], timeout_s=_TIMEOUT_S)
    lines = [line for line in done.text.splitlines() if _WAY.match(line) and not line.endswith('"";')]
    # Relative names of these two are meant below /etc/apt of the host.
    netrc = re.compile(r'(Dir::Etc::netrc(?:parts)?) "(?!/)')
    return "".join(netrc.sub(r'\1 "/etc/apt/', line) + "\n" for line in lines)


def _list_targets(host: Host, *options: str) -> list[tuple[str, str, str]]:
    """URI, suite and label of every archive of the host that has a component `main`."""
    command = ["apt-get", "indextargets", *options, "--format", _FORMAT, "Identifier: Packages"]
    done = host.shell.run(command, timeout_s=_TIMEOUT_S, check=False)
    rows = [line.split("\t") for line in done.text.splitlines()]
    return [(row[0], row[1], row[3]) for row in rows if len(row) == 4 and row[2] == "main" and " " not in row[0]]


def _is_debian(uri: str, label: str | None) -> bool:
    """Many archives of others have suites called `bookworm` or `stable`. Without a label the mirror's path must do."""
    if label is not None:
        return label in ("Debian", "Debian-Security")
    return uri.rstrip("/").rpartition("/")[2].startswith("debian")
