"""The confined parent of a program that reads untrusted data: it passes on what that says, up to a limit.

Called as `supervise BYTES PROGRAM ...`. A damaged disk can make qemu-img name every one of its billion clusters, all of
which would lie in the memory of whoever started it. How far `qemu-img -p` is becomes lines on stderr (`refusal.PERCENT`).
Ends with the program's status, 128 + N when signal N killed it.
"""

from __future__ import annotations

import os
import re
import select
import signal
import sys
from collections.abc import Sequence

from hvctl.hostside import refusal
from hvctl.hostside.refusal import Refused

_CHUNK_BYTES = 65536
_NOT_FOUND = 127  # as a shell says it
_PERCENT = re.compile(rb" *\((\d{1,3})\.\d\d/100%\)[\r\n]*")


def main(arguments: Sequence[str]) -> None:
    """Run it to its end."""
    sys.excepthook = refusal.give_up
    left_bytes = limit_bytes = int(arguments[0])
    process, streams = _start(arguments[1:])
    has_percent, told = "-p" in arguments[1:], -1
    while streams:
        for stream in select.select(list(streams), [], [])[0]:
            data = os.read(stream, _CHUNK_BYTES)
            left_bytes -= len(data)
            if left_bytes < 0:
                os.kill(process, signal.SIGKILL)
                raise Refused(f"the program that reads it has more than {limit_bytes} bytes to say")
            if not data:
                del streams[stream]
                continue
            target = streams[stream]
            if has_percent and target == 1:
                percents = [int(number) for number in _PERCENT.findall(data)]
                data = _PERCENT.sub(b"", data)
                if percents and percents[-1] > told:
                    told = percents[-1]
                    os.write(2, f"{refusal.PERCENT}{told}\n".encode())
            while data:
                data = data[os.write(target, data) :]
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    sys.exit(code if code >= 0 else 128 - code)


def _start(argv: Sequence[str]) -> tuple[int, dict[int, int]]:
    """The program's process, and its streams: from where they are read, to where they go."""
    pipes = {target: os.pipe() for target in (1, 2)}
    process = os.fork()
    if process == 0:
        for target, (_end, into) in pipes.items():
            os.dup2(into, target)
        # Python ignores these two; the program is to know how it was before.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        try:
            os.execvp(argv[0], list(argv))
        except OSError as error:
            os.write(2, f"{argv[0]}: {error.strerror}\n".encode())
        os._exit(_NOT_FOUND)
    for _end, into in pipes.values():
        os.close(into)
    return process, {end: target for target, (end, _into) in pipes.items()}
