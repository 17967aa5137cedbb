"""Key pairs, made by ssh-keygen, and whose keys may log in: the user's own, and hvctl's, so that there is always one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hvctl import config, identity
from hvctl.errors import HostError, HvctlError, InvalidSpec, NotFound
from hvctl.hostside import files, mounts
from hvctl.hostside.beside import Tasks
from hvctl.identity import KeyPair
from hvctl.shell import LocalShell

_AGENT_TIMEOUT_S, _KEYGEN_TIMEOUT_S = 3, 60


def new_pair() -> KeyPair:
    """A fresh ed25519 key pair without a passphrase. Raises HostError without ssh-keygen."""
    with _vanishing_directory() as directory:
        path = directory / "key"
        LocalShell().run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", path], timeout_s=_KEYGEN_TIMEOUT_S
        )
        private = files.read_file(path)
    return KeyPair(private=private, public=identity.public_of(private))


def begin_pair() -> Callable[[], KeyPair]:
    """Begin to make a key pair beside what comes next; what is returned waits for it and gives it, or raises for it."""
    made: list[KeyPair] = []
    tasks = Tasks()
    tasks.add(lambda: made.append(new_pair()))

    def take() -> KeyPair:
        tasks.finish()
        return made[0]

    return take


@contextmanager
def _vanishing_directory() -> Iterator[Path]:
    """A directory for secrets; that of a root who may mount is gone with this process, however it ends."""
    try:
        tree = mounts.open_memory()
    except OSError:
        with tempfile.TemporaryDirectory(prefix="hvctl-") as directory:
            yield Path(directory)
        return
    try:
        yield Path(f"/proc/{os.getpid()}/fd/{tree}")
    finally:
        os.close(tree)


def own_key_path() -> Path:
    """The private key of hvctl's own pair, this user's; made by `ensure_own_key`."""
    return config.data_home() / "ssh" / "id_ed25519"


def ensure_own_key() -> str:
    """The public line of hvctl's own pair, which is made on first use (0600, published whole)."""
    path = own_key_path()
    public = path.with_suffix(".pub")
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            pair = new_pair()
            aside = path.with_name(f".{path.name}.{os.getpid()}")
            files.write_file(aside, pair.private, 0o600)
            try:
                files.publish(aside, path)
                files.write_file(public, f"{pair.public} hvctl\n".encode(), 0o644)
            except FileExistsError:  # another hvctl was quicker: its key is as good
                aside.unlink()
        return identity.public_of(files.read_file(path)) + " hvctl"
    except InvalidSpec as error:
        raise HostError(
            f"hvctl's own key {str(path)!r} is damaged", hint="move it away, and another is made; or restore it"
        ) from error
    except OSError as error:
        raise HostError(
            f"cannot keep hvctl's own key in {str(path.parent)!r}: {error.strerror}",
            hint="check that directory, or set HOME",
        ) from error


def find_public_keys(given: Sequence[str]) -> tuple[str, ...]:
    """Public key lines that may log in: those given (a line, or a file with lines), else the user's own; and hvctl's.

    Raises NotFound for a file that is not there, InvalidSpec for a line that is no public key.
    """
    lines = [line for text in given for line in _lines_of(text)] if given else list(_users_keys())
    return tuple(dict.fromkeys([*lines, ensure_own_key()]))


def _lines_of(text: str) -> Iterator[str]:
    if text.startswith(("ssh-", "ecdsa-", "sk-")):
        yield identity.check_public_key(text)
        return
    path = Path(text).expanduser()
    try:
        content = files.read_file(path, limit_bytes=256 * 1024).decode(errors="replace")
    except OSError as error:
        raise NotFound(f"cannot read the public key file {text!r}: {error.strerror}", hint="--ssh-key FILE") from error
    if "PRIVATE KEY" in content:
        raise InvalidSpec(f"{text!r} holds a private key", hint=f"give the public one: --ssh-key {text}.pub")
    found = [line for line in content.splitlines() if line.strip() and not line.startswith("#")]
    if not found:
        raise InvalidSpec(f"{text!r} holds no public key", hint="--ssh-key ~/.ssh/id_ed25519.pub")
    yield from (identity.check_public_key(line) for line in found)


def _users_keys() -> Iterator[str]:
    """Keys of the ssh agent, then ~/.ssh/id_*.pub; one that is damaged or of an unknown type is left out."""
    lines: list[str] = []
    if os.environ.get("SSH_AUTH_SOCK"):
        try:
            lines += LocalShell().run(["ssh-add", "-L"], timeout_s=_AGENT_TIMEOUT_S, check=False).text.splitlines()
        except HvctlError:  # no agent, no ssh-add: then there are no keys in it
            lines.clear()
    for path in sorted((Path.home() / ".ssh").glob("id_*.pub")):
        try:
            lines += files.read_file(path, limit_bytes=64 * 1024).decode(errors="replace").splitlines()
        except OSError:
            continue
    for line in lines:
        try:
            yield identity.check_public_key(line)
        except InvalidSpec:
            continue
