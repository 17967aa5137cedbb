"""Every way hvctl can fail: one class for each exit code that scripts may rely on.

Raised anywhere, printed once, at the top of the command line. The codes are part of the interface:
2 usage, 3 not found, 4 exists, 5 wrong state, 6 unsupported, 7 invalid spec or template, 8 host, 9 not managed,
10 timed out, 11 other libvirt error, 12 guest failed, 70 a fault of hvctl's own, 130 interrupted.
"""

from __future__ import annotations


class HvctlError(Exception):
    """A failure that the user can act on.

    `message` says what was attempted, on what, and what was found; `hint` is the next command to type, or empty.
    """

    code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @property
    def kind(self) -> str:
        """The name of the class, which `--json` prints: `NotFound`, `WrongState`, ..."""
        return type(self).__name__


class UsageError(HvctlError):
    """The words of the command are wrong."""

    code = 2


class NotFound(HvctlError):
    """An instance, image, template or file that was named does not exist."""

    code = 3


class AlreadyExists(HvctlError):
    """The name is taken."""

    code = 4


class WrongState(HvctlError):
    """The object exists, but cannot do this now: running, stopped, busy, in use."""

    code = 5


class Unsupported(HvctlError):
    """This mode, host or libvirt cannot do it at all."""

    code = 6


class InvalidSpec(HvctlError):
    """A value, a spec or a template that makes no valid instance."""

    code = 7


class HostError(HvctlError):
    """The host is not able: no libvirtd, no permission, no space, a program that failed."""

    code = 8


class NotManaged(HvctlError):
    """The object exists, but hvctl did not make it and leaves it alone."""

    code = 9


class TimedOut(HvctlError):
    """Something did not answer before its deadline."""

    code = 10


class LibvirtFailed(HvctlError):
    """libvirt refused for a reason that no other class describes."""

    code = 11


class GuestFailed(HvctlError):
    """The guest is there but did not do its part: no address, cloud-init failed, agent silent."""

    code = 12


class InternalError(HvctlError):
    """A fault of hvctl's own, which nobody can do anything about but report it (EX_SOFTWARE of sysexits.h)."""

    code = 70


class Interrupted(HvctlError):
    """The user pressed Ctrl-C, or the process was told to end."""

    code = 130


class CommandFailed(HostError):
    """A program on the host ended with an error; carries its exit status and the last lines of its stderr."""

    def __init__(self, message: str, *, hint: str = "", status: int = 1, stderr: str = "") -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.stderr = stderr
