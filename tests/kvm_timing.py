"""An independent timing of KVM: 64-bit code run through the kernel's own interface, without QEMU or firmware.

Prints the nanoseconds of one step of a counting loop. The virtual processor is put straight into long mode, so this
shares no code and no path with the probe. A program of its own because KVM_RUN cannot be given a deadline.
(https://docs.kernel.org/virt/kvm/api.html)
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
import time

KVM_CREATE_VM, KVM_GET_VCPU_MMAP_SIZE, KVM_CREATE_VCPU, KVM_RUN = 0xAE01, 0xAE04, 0xAE41, 0xAE80
KVM_SET_USER_MEMORY_REGION, KVM_SET_REGS, KVM_GET_SREGS, KVM_SET_SREGS = 0x4020AE46, 0x4090AE82, 0x8138AE83, 0x4138AE84
KVM_EXIT_IO = 2
STEPS = 100_000
MEMORY_BYTES = 2 * 1024**2


def main() -> None:
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    machine = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    memory = mmap.mmap(-1, MEMORY_BYTES)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(machine, KVM_SET_USER_MEMORY_REGION, struct.pack("IIQQQ", 0, 0, 0, MEMORY_BYTES, address))
    for table, entry in ((0x2000, 0x3007), (0x3000, 0x4007), (0x4000, 0x0087)):  # PML4, PDPT, PD: one 2 MiB page
        memory[table : table + 8] = struct.pack("<Q", entry)
    code = (
        b"\xe6\x10"  # out 0x10, al: begin
        b"\x48\xc7\xc1" + struct.pack("<i", STEPS)  # mov rcx, STEPS
        + b"\x48\xff\xc9\x75\xfb"  # dec rcx; jnz back
        b"\xe6\x10\xf4"  # out 0x10, al: end; hlt
    )  # fmt: skip
    memory[0x8000 : 0x8000 + len(code)] = code
    vcpu = fcntl.ioctl(machine, KVM_CREATE_VCPU, 0)
    shared = mmap.mmap(vcpu, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0))
    enter_long_mode(vcpu)
    at_ns = [run_to_io(vcpu, shared) for _mark in range(2)]
    print((at_ns[1] - at_ns[0]) / STEPS)


def enter_long_mode(vcpu: int) -> None:
    special = bytearray(312)  # struct kvm_sregs
    fcntl.ioctl(vcpu, KVM_GET_SREGS, special)
    for index in range(6):  # cs ds es fs gs ss: base, limit, selector, type, present, dpl, db, s, l, g
        is_code = index == 0
        kind = (8, 11, 1, 0, 0, 1, 1, 1) if is_code else (16, 3, 1, 0, 0, 1, 0, 1)
        struct.pack_into("<QIHBBBBBBBB", special, 24 * index, 0, 0xFFFFFFFF, *kind, 0)
    for offset, value in ((224, 0x80050033), (240, 0x2000), (248, 0x20), (264, 0x500)):  # cr0 cr3 cr4 efer
        struct.pack_into("<Q", special, offset, value)
    fcntl.ioctl(vcpu, KVM_SET_SREGS, bytes(special))
    registers = bytearray(144)  # struct kvm_regs
    struct.pack_into("<QQ", registers, 128, 0x8000, 2)  # rip, rflags
    fcntl.ioctl(vcpu, KVM_SET_REGS, bytes(registers))


def run_to_io(vcpu: int, shared: mmap.mmap) -> int:
    """Run until the guest writes to a port; the time of that in nanoseconds."""
    fcntl.ioctl(vcpu, KVM_RUN, 0)
    now_ns = time.monotonic_ns()
    (reason,) = struct.unpack_from("<I", shared, 8)
    if reason != KVM_EXIT_IO:
        raise SystemExit(f"the guest left with reason {reason}")
    return now_ns


if __name__ == "__main__":
    main()
