"""Connections to libvirt, on its in-process test driver."""

import subprocess
import sys

_WAITS_FOR_AN_EVENT = """
import threading, libvirt
from hvctl.libvirtapi import connection
connection._LOOP_DELAY_S = 3600
opened = connection.Connection.open("test:///default")
domain = opened.handle.listAllDomains()[0]
stopped = threading.Event()
def tell(*event): stopped.set()
with opened.watching(domain, {libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE: tell}):
    domain.shutdown()
    assert stopped.wait(60)
"""


def test_who_waits_for_an_event_is_told_without_the_event_loops_delay() -> None:
    """In a process of its own, whose loop would begin after an hour."""
    subprocess.run([sys.executable, "-c", _WAITS_FOR_AN_EVENT], check=True, timeout=120)
