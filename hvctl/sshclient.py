"""ssh with a host key that is known beforehand: paramiko's transport, nothing of its trust-on-first-use.

The only home of paramiko. The server must prove the one ed25519 key that hvctl made for the instance; before that, not
a byte of authentication is sent.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvctl.errors import GuestFailed, HostError, HvctlError, TimedOut
from hvctl.model import Endpoint

if TYPE_CHECKING:
    import paramiko

_CONNECT_TIMEOUT_S = 5.0
_HANDSHAKE_TIMEOUT_S = 30.0
# An emulated guest needs seconds for its first login: PAM, the user's session.
_AUTH_TIMEOUT_S = 60.0
_CHANNEL_TIMEOUT_S = 30.0


@contextlib.contextmanager
def connect(endpoint: Endpoint, keys: Sequence[Path]) -> Iterator[paramiko.Transport]:
    """A connection that is logged in, closed at the end of the block.

    `keys` are private key files, tried in order before the ssh agent's. Raises GuestFailed when nothing answers or no
    key is accepted, TimedOut, and HostError when the server's key is not the one that was made for this instance.
    """
    import paramiko

    logging.getLogger("paramiko").addHandler(logging.NullHandler())
    logging.getLogger("paramiko").propagate = False
    with _open_socket(endpoint) as connection:
        transport = paramiko.Transport(connection)
        try:
            _shake_hands(transport, endpoint)
            _log_in(transport, endpoint, keys)
            transport.set_keepalive(30)
            yield transport
        except ConnectionResetError as error:
            raise GuestFailed(
                f"the ssh connection to {endpoint.instance!r} broke: {error.strerror or error}",
                hint="is the guest still running? hvctl list",
            ) from error
        finally:
            transport.close()


def open_command(transport: paramiko.Transport, command: str | None, terminal: tuple[str, int, int] | None) -> Any:
    """A channel that runs a command, or the user's shell for None; `terminal` is (TERM, columns, lines) or none."""
    import paramiko

    try:
        channel = transport.open_session(timeout=_CHANNEL_TIMEOUT_S)
        if terminal is not None:
            name, columns, lines = terminal
            channel.get_pty(name, columns, lines)
        if command is None:
            channel.invoke_shell()
        else:
            channel.exec_command(command.encode("utf-8", "surrogateescape"))
    except paramiko.SSHException as error:
        raise GuestFailed(f"the ssh server refused to run the command: {error}", hint="try again") from error
    return channel


def fingerprint(public: str) -> str:
    """`SHA256:...` of a public key line, as `ssh-keygen -l` prints it."""
    data = base64.b64decode(public.split(" ")[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def _open_socket(endpoint: Endpoint) -> socket.socket:
    try:
        return socket.create_connection((endpoint.address, endpoint.port), timeout=_CONNECT_TIMEOUT_S)
    except OSError as error:
        raise GuestFailed(
            f"{endpoint.instance!r} does not answer on {endpoint.address} port {endpoint.port}: {error.strerror or error}",
            hint=f"see what it does: hvctl logs {endpoint.instance}",
        ) from error


def _shake_hands(transport: paramiko.Transport, endpoint: Endpoint) -> None:
    import paramiko
    from paramiko.ssh_exception import IncompatiblePeer

    transport.banner_timeout = transport.handshake_timeout = _HANDSHAKE_TIMEOUT_S
    transport.auth_timeout = _AUTH_TIMEOUT_S
    options = transport.get_security_options()
    options.key_types = ("ssh-ed25519",)
    try:
        transport.start_client(timeout=_HANDSHAKE_TIMEOUT_S)
    except IncompatiblePeer as error:
        raise HostError(
            f"the ssh server at {endpoint.address} has no ed25519 host key, so it is not {endpoint.instance!r} as hvctl "
            f"made it ({error})",
            hint=f"look at it from inside: hvctl console {endpoint.instance}",
        ) from error
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise _handshake_failure(endpoint, error) from error
    if not transport.initial_kex_done:  # start_client(timeout) just returns when the time is up
        raise _handshake_failure(endpoint, TimeoutError(f"nothing within {_HANDSHAKE_TIMEOUT_S:g} s"))
    offered = f"ssh-ed25519 {transport.get_remote_server_key().get_base64()}"
    if offered != " ".join(endpoint.host_key.split(" ")[:2]):
        raise HostError(
            f"the ssh host key at {endpoint.address} is not the one that hvctl made for {endpoint.instance!r}: expected "
            f"{fingerprint(endpoint.host_key)}, found {fingerprint(offered)}; nothing was sent to it",
            hint=f"somebody may be in between; look at it from inside: hvctl console {endpoint.instance}",
        )


def _handshake_failure(endpoint: Endpoint, error: BaseException) -> HvctlError:
    hint = f"see what it does: hvctl logs {endpoint.instance}"
    if isinstance(error, TimeoutError) or "banner" in str(error) or "Timeout" in str(error):
        return TimedOut(f"the ssh server of {endpoint.instance!r} does not finish its handshake: {error}", hint=hint)
    return GuestFailed(f"the ssh handshake with {endpoint.instance!r} failed: {error}", hint=hint)


def _log_in(transport: paramiko.Transport, endpoint: Endpoint, keys: Sequence[Path]) -> None:
    """Offer each key in turn: files first, then the agent's."""
    import paramiko

    tried = 0
    for key in _private_keys(keys):
        tried += 1
        try:
            if not transport.auth_publickey(endpoint.user, key):
                return
        except paramiko.AuthenticationException:
            continue
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise GuestFailed(
                f"the ssh server of {endpoint.instance!r} ended the login of {endpoint.user!r}: {error}",
                hint=f"hvctl logs {endpoint.instance}",
            ) from error
    raise GuestFailed(
        f"{endpoint.instance!r} accepts none of your keys for user {endpoint.user!r} (tried: {tried})",
        hint=f"go in without ssh and add one: hvctl exec {endpoint.instance} -- ...",
    )


def _private_keys(files: Sequence[Path]) -> Iterator[paramiko.PKey]:
    """Keys without a passphrase from files, then what the agent holds (one with a passphrase belongs there)."""
    import paramiko

    for path in files:
        for kind in (paramiko.Ed25519Key, paramiko.ECDSAKey, paramiko.RSAKey):  # `PKey.from_path` is younger than 2.12
            try:
                yield kind.from_private_key_file(str(path))
                break
            except (OSError, paramiko.SSHException, ValueError):
                continue
    if os.environ.get("SSH_AUTH_SOCK"):
        with contextlib.suppress(paramiko.SSHException, OSError):
            yield from paramiko.Agent().get_keys()
