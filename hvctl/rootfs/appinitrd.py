"""The initrd of VMs of application images: busybox, gosu, what a VM's devices need of a kernel's modules, one script.

Not compressed: it is five megabytes, and unpacking them costs an emulated CPU more than reading them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from hvctl.errors import HostError
from hvctl.host import Host
from hvctl.hostside import files
from hvctl.rootfs import application

KERNEL_ARGUMENTS = ("console=ttyS0", "quiet", "loglevel=3", "panic=1", "net.ifnames=0")
_BOOT = Path(__file__).parent / "guest" / "application" / "boot"
# ext4 and everything else that a root needs is built into the kernels that hvctl boots.
_MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng", "qemu_fw_cfg", "evdev", "button")
_LIMIT_BYTES = 32 * 1024**2


def make(host: Host, modules: Path) -> bytes:
    """The initrd for the kernel whose modules lie in this directory (`lib/modules/RELEASE` of an image of hvctl's)."""
    read = host.shell.call
    content: dict[str, tuple[int, bytes]] = {
        "init": (0o100755, _BOOT.read_bytes()),
        "dev/console": (0o020600, b""),
    }
    for name in ("busybox", "gosu"):
        program = Path(application.find_program(host, name))
        content[f"bin/{name}"] = (0o100755, read(files.read_file, program.resolve(), limit_bytes=_LIMIT_BYTES))
    order = []
    for path in find_order(host.read_text(modules / "modules.dep")):
        order.append(Path(path).name)
        module = read(files.read_file, modules / path, limit_bytes=_LIMIT_BYTES)
        content[f"modules/{order[-1]}"] = (0o100644, module)
    content["modules/order"] = (0o100644, "".join(f"{name}\n" for name in order).encode())
    return format_archive(content)


def find_order(dependencies: str) -> list[str]:
    """The files of the wanted modules and all that they need, in the order to load them (modules.dep(5)).

    Raises HostError when the kernel has one of them in no file; what is built in is not wanted here.
    """
    needs: dict[str, tuple[str, list[str]]] = {}
    for line in dependencies.splitlines():
        path, _, rest = line.partition(":")
        needs[Path(path).name.partition(".")[0].replace("-", "_")] = (path, rest.split())
    found: list[str] = []
    for name in _MODULES:
        if name not in needs:
            raise HostError(f"the kernel has no module {name!r}", hint="hvctl image build debian-12")
        module, others = needs[name]
        found += [each for each in (*reversed(others), module) if each not in found]
    return found


def format_archive(content: Mapping[str, tuple[int, bytes]]) -> bytes:
    """A cpio archive as the kernel unpacks it (Documentation/driver-api/early-userspace/buffer-format.rst), with the
    directories that the names need; a character device is the console."""
    return b"".join(_entries(content))


def _entries(content: Mapping[str, tuple[int, bytes]]) -> Iterator[bytes]:
    folders = sorted({str(parent) for name in content for parent in Path(name).parents if str(parent) != "."})
    for number, folder in enumerate(folders):
        yield _entry(number + 1, folder, 0o040755, b"")
    for number, (name, (mode, data)) in enumerate(content.items()):
        yield _entry(len(folders) + number + 1, name, mode, data)
    yield _entry(0, "TRAILER!!!", 0, b"")


def _entry(inode: int, name: str, mode: int, data: bytes) -> bytes:
    console = (5, 1) if mode & 0o170000 == 0o020000 else (0, 0)
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, *console, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)
