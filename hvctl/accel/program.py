"""The guest program of the probe: a 64 KiB firmware image that goes from the reset vector to 64-bit code and back out.

No file comes with hvctl: the image is put together here, instruction by instruction, and handed to `qemu -bios`.
Without SeaBIOS in front, everything that is timed and judged is ours. What it does:

    real mode       load a GDT, switch on protection                (Intel SDM 3A, 10.9 "Mode switching")
    protected mode  page tables in RAM, PAE, EFER.LME, paging       (Intel SDM 3A, 10.8.5 "Initializing IA-32e mode")
    long mode       ROUNDS times: say "@", run STEPS steps of a 64-bit generator; say "@", then "=" and the state

It speaks through QEMU's isa-debugcon (port 0xe9), lines to which the host gives the times, and ends QEMU with status
`EXIT_STATUS` through isa-debug-exit.
"""

from __future__ import annotations

import struct

ROUNDS = 10
STEPS = 1_000_000
"""Of one round. All of them take some 11 ms where 64-bit code runs, and seven times the deadline where it is emulated:
so no delay in hearing the guest can turn one verdict into the other."""
EXIT_STATUS = 33
"""isa-debug-exit makes status `value << 1 | 1` of what is written to it: 0x10 here."""

_SIZE = 64 * 1024
_BASE = 0xF0000  # where the last 64 KiB of the firmware are visible below 1 MiB
_PROTECTED, _LONG, _GDT, _GDT_POINTER, _RESET = 0x100, 0x200, 0x300, 0x320, 0xFFF0
_MULTIPLIER = 6364136223846793005  # Knuth's, for a 64-bit linear congruential generator
_MASK = 2**64 - 1


def build() -> bytes:
    """The firmware image."""
    image = bytearray(b"\xf4" * _SIZE)  # hlt
    for offset, code in (
        (0, _real_mode()),
        (_PROTECTED, _protected_mode()),
        (_LONG, _long_mode()),
        (_GDT, _descriptors()),
        (_GDT_POINTER, struct.pack("<HI", len(_descriptors()) - 1, _BASE + _GDT)),
        (_RESET, b"\xe9" + struct.pack("<H", -(_RESET + 3) & 0xFFFF)),  # jmp 0
    ):
        image[offset : offset + len(code)] = code
    return bytes(image)


def expected_line() -> str:
    """The line with the generator's state that only a 64-bit processor that ran every step can say."""
    return "=" + "".join(chr(ord("A") + int(digit, 16)) for digit in f"{state_after(ROUNDS * STEPS):016x}")


def state_after(steps: int) -> int:
    """The generator's state, by the sum of a geometric series; Python would take seconds to walk there."""
    factor = _MULTIPLIER - 1
    return (pow(_MULTIPLIER, steps, factor << 64) - 1) // factor & _MASK


def _descriptors() -> bytes:
    """Null, 32-bit code (0x08), data (0x10), 64-bit code (0x18).

    All "accessed" already: the processor would else write that bit here, into read-only memory, and a KVM under
    emulated SVM repeats that write for ever.
    """
    return struct.pack("<4Q", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00AF9B000000FFFF)


def _real_mode() -> bytes:
    return b"".join(
        (
            b"\xfa",  # cli
            b"\x2e\x66\x0f\x01\x16" + struct.pack("<H", _GDT_POINTER),  # lgdt cs:[pointer]
            b"\x0f\x20\xc0",  # mov eax, cr0
            b"\x0c\x01",  # or al, 1: protection
            b"\x0f\x22\xc0",  # mov cr0, eax
            b"\x66\xea" + struct.pack("<IH", _BASE + _PROTECTED, 0x08),  # jmp 0x08:protected
        )
    )


def _protected_mode() -> bytes:
    """One 2 MiB identity page; its tables lie in RAM, because the processor writes "accessed" bits into them."""
    return b"".join(
        (
            b"\x66\xb8\x10\x00\x8e\xd8",  # mov ax, 0x10; mov ds, ax
            b"\xc7\x05" + struct.pack("<II", 0x1000, 0x2003),  # mov dword [PML4], PDPT | present, writable
            b"\xc7\x05" + struct.pack("<II", 0x2000, 0x3003),  # mov dword [PDPT], PD | present, writable
            b"\xc7\x05" + struct.pack("<II", 0x3000, 0x0083),  # mov dword [PD], 0 | present, writable, 2 MiB
            b"\x0f\x20\xe0\x0c\x20\x0f\x22\xe0",  # mov eax, cr4; or al, 0x20 (PAE); mov cr4, eax
            b"\xb8" + struct.pack("<I", 0x1000) + b"\x0f\x22\xd8",  # mov eax, PML4; mov cr3, eax
            b"\xb9" + struct.pack("<I", 0xC0000080),  # mov ecx, EFER
            b"\x0f\x32\x0d" + struct.pack("<I", 0x100) + b"\x0f\x30",  # rdmsr; or eax, LME; wrmsr
            b"\x0f\x20\xc0",  # mov eax, cr0
            b"\x25" + struct.pack("<I", 0x9FFFFFFF),  # and eax, ~(CD | NW): caches on
            b"\x0d" + struct.pack("<I", 0x80000000) + b"\x0f\x22\xc0",  # or eax, PG; mov cr0, eax
            b"\xea" + struct.pack("<IH", _BASE + _LONG, 0x18),  # jmp 0x18:long
        )
    )


def _long_mode() -> bytes:
    step = _loop(
        b"\x49\x0f\xaf\xd9"  # imul rbx, r9
        b"\x48\xff\xc3"  # inc rbx
        b"\xff\xc9"  # dec ecx
    )
    one_round = _loop(
        _say("@\n")
        + b"\xb9" + struct.pack("<I", STEPS)  # mov ecx, STEPS
        + step
        + b"\x41\xff\xc8"  # dec r8d
    )  # fmt: skip
    digit = _loop(
        b"\x48\xc1\xc3\x04"  # rol rbx, 4
        b"\x88\xd8\x24\x0f\x04\x41\xee"  # mov al, bl; and al, 15; add al, 'A'; out dx, al
        b"\xff\xc9"  # dec ecx
    )
    return b"".join(
        (
            b"\xba" + struct.pack("<I", 0xE9),  # mov edx, debugcon
            b"\x41\xb8" + struct.pack("<I", ROUNDS),  # mov r8d, ROUNDS
            b"\x48\x31\xdb",  # xor rbx, rbx
            b"\x49\xb9" + struct.pack("<Q", _MULTIPLIER),  # mov r9, multiplier
            one_round,
            _say("@\n="),
            b"\xb9" + struct.pack("<I", 16),  # mov ecx, 16
            digit,
            _say("\n"),
            b"\xba" + struct.pack("<I", 0x501) + b"\xb0\x10\xee",  # mov edx, debug-exit; mov al, 0x10; out dx, al
            b"\xf4\xeb\xfd",  # hlt; jmp back to it
        )
    )


def _say(text: str) -> bytes:
    """`mov al, character; out dx, al` for each character."""
    return b"".join(bytes((0xB0, ord(character), 0xEE)) for character in text)


def _loop(body: bytes) -> bytes:
    """The body, and a jump back to its first instruction while the last one did not give zero."""
    return body + b"\x75" + struct.pack("b", -(len(body) + 2))  # jnz
