"""Programs and effects on a host: the same interface for this machine and, later, for one behind ssh."""

from hvctl.shell.base import Completed, Shell
from hvctl.shell.local import LocalShell

__all__ = ["Completed", "LocalShell", "Shell"]
