"""Archives that want something bad: what is refused, each with the reason, and what may stay but must stay inside."""

from __future__ import annotations

import gzip
import lzma
import random
from collections.abc import Iterator

from tests.tarballs import BLOCK, END, entry, header, long_name, pad, pax, record, tar, zstd

Archives = tuple[bytes, ...]

_HUGE = b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7  # base-256
_NEGATIVE = b"\xff" * 12
_LINK_OUT = entry("out", "2", link="/")
_UP = "../" * 12
_GOOD = entry("good", content=b"good")
SECRET = "canary"
"""A file outside, beside the tree."""


def refused() -> dict[str, tuple[Archives, str]]:
    """Name -> layers, and what the refusal says."""
    return dict(
        [*_names(), *_links(), *_headers(), *_extended(), *_attributes(), *_sparse(), *_whiteouts(), *_damage()]
    )


def _names() -> Iterator[tuple[str, tuple[Archives, str]]]:
    upwards = ["../x", "a/../../x", "..", "a/..", "a/b/../c", "./../x", "a/./../b", ".//../x", "a//../b", "../"]
    for name in upwards:
        yield f"name {name}", ((tar(entry(name)),), "leads upwards")
        yield f"directory {name}", ((tar(entry(name, "5")),), "leads upwards")
    for name in ("/x", "//x", "/", "/../x", "/etc/passwd"):
        yield f"name {name}", ((tar(entry(name)),), "absolute name")
    yield "pax name upwards", ((tar(pax(("path", "../x")), entry("fine")),), "leads upwards")
    yield "pax name absolute", ((tar(pax(("path", "/x")), entry("fine")),), "absolute name")
    yield "gnu name upwards", ((tar(long_name("../x"), entry("fine")),), "leads upwards")
    yield "prefix upwards", ((tar(entry("x", prefix=b"..")),), "leads upwards")
    yield "prefix absolute", ((tar(entry("x", prefix=b"/etc")),), "absolute name")
    yield "pax name with zero byte", ((tar(pax(("path", b"a\0b")), entry("fine")),), "zero byte")
    yield "name of 256 bytes", ((tar(pax(("path", "n" * 256)), entry("fine")),), "longer name than 255")
    yield "path of 4 KiB", ((tar(pax(("path", "abc/" * 1024)), entry("fine")),), "longer name than 2048")
    yield "300 directories deep", ((tar(pax(("path", "a/" * 300)), entry("fine", "5")),), "deeper than 200")
    yield "root as file", ((tar(entry(".")),), "replaces the root")
    yield "root as link", ((tar(entry("./", "2", link="/etc")),), "replaces the root")
    yield "root without a name", ((tar(entry("")),), "replaces the root")
    yield "file with something in it", ((tar(entry("a"), entry("a/b")),), "is no directory")
    yield "file of a lower layer with something in it", ((tar(entry("a")), tar(entry("a/b/c"))), "is no directory")


def _links() -> Iterator[tuple[str, tuple[Archives, str]]]:
    for name in ("../canary", _UP + "etc/passwd", "a/../../canary"):
        yield f"hard link to {name}", ((tar(entry("x", "1", link=name)),), "leads upwards")
    for name in ("canary", "/etc/passwd", "nowhere/x", ""):
        yield f"hard link to {name!r}", ((tar(entry("x", "1", link=name)),), "no file here")
    yield "hard link to a directory", ((tar(entry("d", "5"), entry("x", "1", link="d")),), "no file here")
    yield "hard link to itself", ((tar(entry("x"), entry("x", "1", link="./x")),), "what it replaces")
    yield "hard link into what it replaces", ((tar(entry("d/f"), entry("d", "1", link="d/f")),), "what it replaces")
    yield "hard link through a link out", ((tar(_LINK_OUT, entry("x", "1", link="out/etc/passwd")),), "no file here")
    yield "hard link, gnu name upwards", ((tar(long_name("../canary", "K"), entry("x", "1")),), "leads upwards")
    yield "hard link, pax name upwards", ((tar(pax(("linkpath", "../canary")), entry("x", "1")),), "leads upwards")
    yield "link to nothing", ((tar(entry("x", "2")),), "a link to nothing")
    yield "link to 5000 bytes", ((tar(pax(("linkpath", "a" * 5000)), entry("x", "2")),), "a link to nothing")
    yield "link with zero byte", ((tar(pax(("linkpath", b"a\0b")), entry("x", "2")),), "a link to nothing")
    loop = entry("a", "2", link="b") + entry("b", "2", link="a")
    yield "loop of links", ((tar(loop, entry("a/x")),), "too many links")
    yield "link to itself", ((tar(entry("a", "2", link="a"), entry("a/x")),), "too many links")
    chain = b"".join(entry(f"l{number}", "2", link=f"l{number + 1}") for number in range(50))
    yield "chain of 50 links", ((tar(chain, entry("l0/x")),), "too many links")
    deep = b"".join(entry(f"s{number + 1}", "2", link=f"s{number}/" + "d/" * 20) for number in range(1, 20))
    steps = b"".join(entry(f"s{number}/x") for number in range(1, 20))
    yield "depth built of links", ((tar(entry("s1", "2", link="."), deep, steps),), "deeper than 200")
    wide = b"".join(entry(f"s{number + 1}", "2", link=f"s{number}/" + "d" * 90) for number in range(1, 30))
    steps = b"".join(entry(f"s{number}/x") for number in range(1, 30))
    yield "long path built of links", ((tar(entry("s1", "2", link="."), wide, steps),), "longer path than 2048")
    for kind, what in (("3", "character"), ("4", "block")):
        yield f"{what} device", ((tar(entry("mem", kind)),), "is a device")
        yield f"{what} device in etc", ((tar(entry("etc/mem", kind)),), "is a device")
        yield f"{what} device called dev", ((tar(entry("dev", kind)),), "is a device")
    yield (
        "device through a link called dev",
        ((tar(entry("dev", "2", link="etc"), entry("dev/m", "3")),), "is a device"),
    )
    yield "overlayfs whiteout", ((tar(entry("x")), tar(entry("x", "3"))), "is a device")


def _headers() -> Iterator[tuple[str, tuple[Archives, str]]]:
    for kind in "VMDNAEIW89\xff":
        yield f"type {kind!r}", ((tar(entry("x", kind)),), "unknown type")
    yield "wrong checksum first", ((tar(entry("x", checksum=b"000001\0 ")),), "no tar archive")
    yield "wrong checksum later", ((tar(_GOOD, entry("x", checksum=b"000001\0 ")),), "checksum is wrong")
    yield "checksum that is no number", ((tar(entry("x", checksum=b"chksum\0 ")),), "no number")
    for field in ("mode", "uid", "gid"):
        yield f"{field} that is no number", ((tar(entry("x", **{field: b"wrong\0\0\0"})),), "no number")
        yield f"{field} with an 8 in it", ((tar(entry("x", **{field: b"0000008\0"})),), "no number")
    yield "time that is no number", ((tar(entry("x", mtime=b"now\0")),), "no number")
    yield "size that is no number", ((tar(entry("x", size=b"0x100\0")),), "no number")
    yield "size with a sign", ((tar(entry("x", size=b"-0000000001\0")),), "no number")
    yield "negative size", ((tar(entry("x", size=_NEGATIVE)),), "negative size")
    yield "huge size", ((tar(entry("x", size=_HUGE)),), "expands to more than")
    yield "huge octal size", ((tar(entry("x", size=b"77777777777\0"), _GOOD),), "expands to more than")
    yield "huge owner", ((tar(entry("x", uid=b"\x80\0\0\0\xff\xff\xff\xff")),), "impossible owner")
    yield "negative owner", ((tar(entry("x", gid=b"\xff" * 8)),), "impossible owner")


def _extended() -> Iterator[tuple[str, tuple[Archives, str]]]:
    for key in ("size", "uid", "gid"):
        for value in ("-1", "1.5", "0x10", "9" * 21, "ten", " 1"):
            yield f"pax {key} {value[:5]}", ((tar(pax((key, value)), entry("x")),), "no number")
    yield "pax size of more than there is", ((tar(pax(("size", "4000")), entry("x", content=b"few")),), "cut short")
    yield "pax size of 9 EiB", ((tar(pax(("size", str(9 * 2**60))), entry("x")),), "expands to more than")
    yield "pax size of less than there is", ((tar(pax(("size", "1")), entry("x", content=b"n" * 3000)),), "checksum")
    yield "pax owner of 2^32", ((tar(pax(("uid", str(2**32)))) + tar(entry("x")),), "belongs to nothing")
    yield "pax owner of 2^32 - 1", ((tar(pax(("uid", str(2**32 - 1))), entry("x")),), "impossible owner")
    yield "pax time", ((tar(pax(("mtime", "yesterday")), entry("x")),), "no time")
    for what, content in {
        "length 0": b"0 path=x\n",
        "length too long": b"999 path=x\n",
        "length too short": b"5 path=x\n",
        "no length": b"path=x\n",
        "no key": b"6 abc\n",
        "no newline": b"9 path=xy",
        "no space": b"1234567890123456789012345678901234567890",
        "only zeros": bytes(100),
        "negative": b"-9 path=x\n",
    }.items():
        yield f"pax header, {what}", ((tar(entry("p", "x", content), entry("x")),), "damaged")
    yield "pax header of 2 MiB", ((tar(entry("p", "x", bytes(2**21)), entry("x")),), "is longer than")
    yield "pax header of 8 GiB", ((tar(header("p", "x", size=b"77777777777\0")),), "is longer than")
    yield "pax header of a negative size", ((tar(header("p", "x", size=_NEGATIVE)),), "is longer than")
    yield "gnu name of 2 MiB", ((tar(long_name("n" * 2**21), entry("x")),), "is longer than")
    yield "9 gnu names", ((tar(*[long_name("n")] * 9, entry("x")),), "more than 8 headers")
    yield "9 pax headers", ((tar(*[pax(("path", "n"))] * 9, entry("x")),), "more than 8 headers")
    yield (
        "gnu names and links in turns",
        ((tar(*[long_name("n"), long_name("n", "K")] * 5, entry("x")),), "more than 8"),
    )
    yield "pax header at the end", ((tar(_GOOD, pax(("path", "n"))),), "belongs to nothing")
    yield "gnu name at the end", ((tar(_GOOD, long_name("n")),), "belongs to nothing")
    yield "gnu name cut short", ((header("x", "L", size=5000) + bytes(100),), "cut short")


def _attributes() -> Iterator[tuple[str, tuple[Archives, str]]]:
    for what, key, value in (
        ("capability that is none", "SCHILY.xattr.security.capability", b"all of them"),
        ("capability of no version", "SCHILY.xattr.security.capability", b"\0" * 20),
        ("long attribute name", "SCHILY.xattr.user." + "n" * 300, b"x"),
        ("long attribute", "SCHILY.xattr.user.n", b"x" * 70_000),
        ("access list that is none", "SCHILY.xattr.system.posix_acl_access", b"\xff" * 17),
    ):
        yield what, ((tar(pax((key, value)), entry("x")),), "impossible attribute")
    yield (
        "attribute name with zero byte",
        ((tar(pax(("SCHILY.xattr.user.a\0b", b"x")), entry("x")),), "impossible attr"),
    )
    yield "attribute that is no base64", ((tar(pax(("LIBARCHIVE.xattr.user.n", b"*")), entry("x")),), "is damaged")


def _sparse() -> Iterator[tuple[str, tuple[Archives, str]]]:
    def new(numbers: str, size: str = "1000", content: bytes = b"") -> bytes:
        records = [("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", size)]
        return tar(pax(*records), entry("x", content=pad(numbers.replace(" ", "\n").encode()) + content))

    def middle(numbers: str, size: str = "1000", content: bytes = b"") -> bytes:
        return tar(pax(("GNU.sparse.map", numbers), ("GNU.sparse.size", size)), entry("x", content=content))

    def old(*numbers: int, size: int = 1000, more: bytes = b"\0") -> bytes:
        fields = b"".join(b"%011o\0" % number for number in numbers).ljust(96, b"\0") + more + b"%011o\0" % size
        return header("x", "S", size=0, old_sparse=fields, magic=b"ustar  \0")

    damaged = "map of a sparse file is damaged"
    yield "sparse, overlapping", ((new("2 0 100 50 100 ", content=bytes(200)),), damaged)
    yield "sparse, backwards", ((new("2 500 10 0 10 ", content=bytes(20)),), damaged)
    yield "sparse, beyond its size", ((new("1 900 200 ", content=bytes(200)),), damaged)
    yield "sparse, more than there is", ((new("1 0 500 ", content=bytes(100)),), damaged)
    yield "sparse, less than there is", ((new("1 0 50 ", content=bytes(100)),), damaged)
    yield "sparse, no numbers", ((new("one two three "),), damaged)
    yield "sparse, negative", ((new("1 -5 10 ", content=bytes(10)),), damaged)
    yield "sparse, no end of numbers", ((new("9 0 0 0 0"),), damaged)
    yield "sparse, a million pieces", ((new("1000000 0 1 "),), "more than 65536 pieces")
    yield "sparse, 8 EiB", ((new("1 0 0 ", str(2**63)),), "expands to more than")
    yield "sparse map, odd", ((middle("0,10,20", content=bytes(10)),), damaged)
    yield "sparse map, no numbers", ((middle("a,b"),), damaged)
    yield "sparse map, 8 EiB", ((middle("0,0", str(2**63)),), "expands to more than")
    yield "sparse, old pax", ((tar(pax(("GNU.sparse.offset", "0")), entry("x")),), "of an old kind")
    yield "sparse, old gnu, overlapping", ((tar(old(0, 100, 50, 100)),), damaged)
    yield "sparse, old gnu, beyond", ((tar(old(900, 200)),), damaged)
    yield "sparse, old gnu, 8 GiB", ((tar(old(0, 0, size=8**11 - 1) + _GOOD),), "expands to more than")
    endless = (b"%011o\0" % 0) * 42 + b"\1" + bytes(7)
    yield "sparse, old gnu, endless", ((old(0, 0, more=b"\1") + endless * 4000,), "more than 65536 pieces")


def _whiteouts() -> Iterator[tuple[str, tuple[Archives, str]]]:
    lower = tar(entry("a/b"))
    for name in (".wh.", ".wh..", ".wh...", "a/.wh.", "a/.wh..", "a/.wh..."):
        yield f"whiteout {name}", ((lower, tar(entry(name))), "removes no name")
    for name in ("../.wh.canary", "a/../../.wh.canary", "../.wh..wh..opq", "../.wh..wh.plnk"):
        yield f"whiteout {name}", ((lower, tar(entry(name))), "leads upwards")
    for name in ("/.wh.canary", "/.wh..wh..opq"):
        yield f"whiteout {name}", ((lower, tar(entry(name))), "absolute name")
    for name in (".wh.a/b", ".wh.a/.wh.b", "a/.wh.b/c/d", ".wh..wh..opq/x", ".wh.../canary"):
        yield f"whiteout with something in it {name}", ((lower, tar(entry(name))), "lies in a whiteout")


def _damage() -> Iterator[tuple[str, tuple[Archives, str]]]:
    content = random.Random(4).randbytes(200_000)
    whole = tar(_GOOD, entry("x", content=content))
    compressed = {"gzip": gzip.compress(whole), "xz": lzma.compress(whole), "zstd": zstd(whole)}
    for name, blob in compressed.items():
        yield f"{name} cut short", ((blob[: len(blob) // 2],), "cannot be expanded")
        yield f"{name} cut before its checksum", ((blob[:-2],), "cannot be expanded")
        middle = len(blob) // 2
        yield (
            f"{name} with a flipped bit",
            ((blob[:middle] + bytes([blob[middle] ^ 4]) + blob[middle + 1 :],), "cannot be expanded"),
        )
        yield f"{name} with rubbish behind", ((blob + b"rubbish" * 9,), "cannot be expanded")
        yield f"{name} of nothing", ((compressed[name][:6],), "cannot be expanded")
        yield f"{name} of rubbish", ((blob[:10] + content[:5000],), "cannot be expanded|no tar archive")
    yield "xz that wants 4 GiB of memory", ((_xz_with_dictionary(),), "cannot be expanded")
    yield "tar cut in a header", ((whole[: BLOCK // 2],), "cut short")
    yield "tar cut in the content", ((whole[:100_000],), "cut short")
    yield "tar cut between entries", ((whole[: 2 * BLOCK],), "no end mark")
    yield "one block of zeros, then more", ((tar(_GOOD)[:-BLOCK] + tar(_GOOD),), "goes on after an end mark")
    yield "text", ((b"<html>404 not found</html>" * 100,), "no tar archive|no number")
    yield "noise", ((content[:10_000],), "no tar archive|no number")
    yield "squashfs cut short", ((b"hsqs" + bytes(2000),), "cannot be expanded")
    yield "squashfs of noise", ((b"hsqs" + content[:5000],), "cannot be expanded")


def _xz_with_dictionary() -> bytes:
    """A stream whose header asks for a dictionary of 1.5 GiB."""
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 16, "preset": 0}]
    blob = bytearray(lzma.compress(tar(_GOOD), filters=filters))
    at = blob.index(b"\x21\x01", 12)  # LZMA2, one byte of properties (xz file format, 5.3.1)
    blob[at + 2] = 39  # 3 << 30 / 2
    import zlib

    size = (blob[12] + 1) * 4
    blob[12 + size - 4 : 12 + size] = zlib.crc32(blob[12 : 12 + size - 4]).to_bytes(4, "little")
    return bytes(blob)


def contained() -> dict[str, Archives]:
    """Name -> layers that are taken, since nothing of them can come out; they all try."""
    through = (entry("out/canary", content=b"owned"), entry("out/etc/passwd", content=b"owned"))
    up = entry("out", "2", link=_UP)
    return {
        "write through a link to /": (tar(_LINK_OUT, *through),),
        "write through a link upwards": (tar(up, *through),),
        "write through a link of a lower layer": (tar(_LINK_OUT), tar(*through)),
        "write through a link upwards of a lower layer": (tar(up), tar(*through)),
        "write over a link": (tar(entry("x", "2", link="/canary"), entry("x", content=b"owned")),),
        "write over a hard link to a link": (
            tar(entry("s", "2", link="../canary"), entry("h", "1", link="s"), entry("h", content=b"owned")),
        ),
        "change the owner through a link": (tar(entry("x", "2", link="/canary", uid=b"0001750\0", mode=b"0000777\0")),),
        "directory over a link out": (tar(entry("d", "2", link=_UP), entry("d", "5"), entry("d/canary")),),
        "directory over a link of a lower layer": (tar(up), tar(entry("out", "5", mode=b"0000777\0"), *through)),
        "chain of links out": (
            tar(entry("a", "2", link="b"), entry("b", "2", link="c"), entry("c", "2", link=_UP), entry("a/canary")),
        ),
        "link in a directory in a link": (
            tar(entry("d/up", "2", link="../.."), entry("e", "2", link="d/up/.."), entry("e/canary", content=b"owned")),
        ),
        "whiteout through a link": (tar(_LINK_OUT, entry("etc/x")), tar(entry("out/.wh.canary"), entry("out/.wh.etc"))),
        "whiteout through a link upwards": (tar(up), tar(entry("out/.wh.canary"))),
        "opaque through a link": (tar(up, entry("x")), tar(entry("out/.wh..wh..opq"))),
        "whiteout of a link out": (tar(_LINK_OUT), tar(entry(".wh.out"))),
        "hard link, then write through the first name": (tar(entry("a"), entry("b", "1", link="a"), entry("a")),),
        "absolute hard link": (tar(entry("a", content=b"a"), entry("b", "1", link="/a")),),
        "devices below dev": (tar(entry("dev/mem", "3"), entry("dev/sub/sda", "4")),),
        "fifo": (tar(entry("pipe", "6")), tar(entry("pipe"))),
        "newline, right-to-left mark, escape": (
            tar(*(entry(n) for n in ("a\nb", "a\u202eb", "a\x1b[2Jb", "\\", "-rf"))),
        ),
        "bytes that are no text": (tar(entry(b"\xff\xfe"), pax(("path", b"\xc3\x28")), entry("x")),),
        "the same name twenty times": (tar(*(entry("x", content=b"%d" % number) for number in range(20))),),
        "file, directory, link, fifo in turns": (
            tar(*[entry("x"), entry("x", "5"), entry("x/y"), entry("x", "2", link="."), entry("x", "6")] * 3),
        ),
        "overlay's own attributes": (tar(pax(("SCHILY.xattr.trusted.overlay.opaque", "y")), entry("d", "5")),),
        "overlay's own attributes of a user": (tar(pax(("SCHILY.xattr.user.overlay.opaque", "y")), entry("d", "5")),),
        "global headers": (tar(pax(("path", "../x"), kind="g"), entry("fine"), pax(("comment", "c"), kind="g")),),
        "longest time": (tar(pax(("mtime", "9" * 18)), entry("x"), pax(("mtime", "-" + "9" * 18)), entry("y")),),
        "rubbish behind the end": (tar(_GOOD) + b"rubbish" * 1000,),
        "signed checksum": (tar(_signed()),),
        "lone zero block at the end": (_GOOD + bytes(BLOCK),),
    }


def _signed() -> bytes:
    block = bytearray(header(b"\xe4", size=0))
    block[148:156] = b" " * 8
    total = sum(byte - 256 if byte > 127 else byte for byte in block)
    block[148:156] = b"%06o\0 " % total
    return bytes(block)


__all__ = ["END", "SECRET", "contained", "record", "refused"]
