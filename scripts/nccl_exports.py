#!/usr/bin/env python3
"""The public functions that real NCCL libraries export: reads them, writes and checks tests/data/nccl-exports.txt.

The libraries are those of NVIDIA's wheels. Their symbol tables lie in the first few hundred kilobytes, and no more is
fetched.

Usage: scripts/nccl_exports.py --check [VERSION...]   compare table and libraries [default: oldest and newest release]
       scripts/nccl_exports.py --write                read all releases from 2.20 on and write the table
       scripts/nccl_exports.py --new                  name releases on the index that the table lacks
"""

import pathlib
import re
import struct
import sys

import pypi

TABLE = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data" / "nccl-exports.txt"
PACKAGES = ("nvidia-nccl-cu12", "nvidia-nccl-cu13")
MEMBER = "nvidia/nccl/lib/libnccl.so.2"
FIRST = (2, 20)
NAME = re.compile(r"nccl[A-Z]\w*")

HEAD = """\
# The public functions (ncclX, each with its twin pncclX) that libnccl.so.2 exports, read out of NVIDIA's x86-64 wheels
# and written by scripts/nccl_exports.py. A release lists what it has beyond (+) or no longer has of (-) the one above
# it. The wheels of one release for several CUDA versions export the same.
"""


class Layout(Exception):
    """The file does not begin as GNU ld lays out a library."""


def gnu_hash(name):
    value = 5381
    for byte in name.encode():
        value = (value * 33 + byte) & 0xFFFFFFFF
    return value


def exports(read):
    """Defined dynamic symbols of a library whose first bytes `read(n)` gives.

    Without the sections' table, which is at the end: after the notes come .gnu.hash, .dynsym and .dynstr. That they do
    is proved by the hash table, which holds a hash of every name found.
    """
    data = read(1 << 16)

    def need(size):
        nonlocal data
        if len(data) < size:
            data += read(size - len(data))
        if len(data) < size:
            raise Layout("the file ends early")

    if data[:6] != b"\x7fELF\x02\x01":
        raise Layout("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", data, 32)
    (count,) = struct.unpack_from("<H", data, 56)
    ends = []
    for index in range(count):
        kind, _, offset, _, _, size = struct.unpack_from("<IIQQQQ", data, table + 56 * index)
        if kind == 4:
            ends.append(offset + size)
    at = (min(ends, default=table + 56 * count) + 7) & ~7

    buckets, first, bloom, _ = struct.unpack_from("<IIII", data, at)
    if not (0 < buckets < 1 << 16 and 0 < first < 1 << 16 and 0 < bloom < 1 << 16):
        raise Layout("no hash table behind the notes")
    start = at + 16 + 8 * bloom
    chains = start + 4 * buckets
    need(chains)
    last = max(struct.unpack_from(f"<{buckets}I", data, start))
    while True:
        here = chains + 4 * (last - first)
        need(here + 4)
        if struct.unpack_from("<I", data, here)[0] & 1:
            break
        last += 1
    hashes = struct.unpack_from(f"<{last + 1 - first}I", data, chains)
    symbols = (chains + 4 * len(hashes) + 7) & ~7
    strings = symbols + 24 * (last + 1)
    need(strings)
    entries = [struct.unpack_from("<IBBHQQ", data, symbols + 24 * index) for index in range(last + 1)]
    # Names are short; one that is longer than what was read fails below.
    need(strings + max(entry[0] for entry in entries) + 512)

    found = set()
    for index, (name, info, other, section, _, _) in enumerate(entries[first:]):
        end = data.find(b"\0", strings + name)
        text = data[strings + name : end].decode()
        if (gnu_hash(text) | 1) != (hashes[index] | 1):
            raise Layout(f"the hash of {text!r} is not that of the table")
        if section != 0 and info >> 4 in (1, 2) and other & 3 in (0, 3):
            found.add(text)
    return found


def public(package, version):
    """Public names that one wheel's library exports.

    NCCL declares every public function under two names, ncclX and pncclX. Without its twin a name is none that a header
    has: some releases export a few of those by accident.
    """
    with pypi.wheel(f"{package}=={version}").open(MEMBER) as library:
        names = exports(library.read)
    pairs = ((name, "p" + name) for name in names if NAME.fullmatch(name))
    found = {name for pair in pairs if pair[1] in names for name in pair}
    if "ncclAllReduce" not in found:
        raise Layout(f"{package} {version} exports no ncclAllReduce: {sorted(names)[:5]}")
    return found


def number(version):
    return tuple(int(part) for part in re.findall(r"\d+", version))


def releases():
    """(version, packages that have it), oldest first."""
    having = {}
    for package in PACKAGES:
        listed = pypi.pip("index", "versions", package)
        (line,) = re.findall(r"Available versions: (.*)", listed)
        for version in line.split(", "):
            if number(version)[:2] >= FIRST:
                having.setdefault(version, []).append(package)
    return sorted(having.items(), key=lambda item: number(item[0]))


def read_table():
    """version -> (packages, names), in the table's order."""
    table, names, packages, version = {}, set(), [], None
    for line in TABLE.read_text().splitlines():
        if line.startswith("#") or not line:
            continue
        if line[0] in "+-":
            (names.add if line[0] == "+" else names.remove)(line[1:])
        else:
            version, *packages = line.split()
        table[version] = (packages, frozenset(names))
    return table


def write():
    text, before = HEAD, set()
    for version, packages in releases():
        found = [public(package, version) for package in packages]
        if any(names != found[0] for names in found):
            sys.exit(f"{version}: the wheels of {packages} differ; the table has no form for that")
        changes = [(name, "-") for name in before - found[0]] + [(name, "+") for name in found[0] - before]
        text += f"\n{version} {' '.join(packages)}\n" + "".join(f"{sign}{name}\n" for name, sign in sorted(changes))
        before = found[0]
        print(f"{version}: {len(before)} names", flush=True)
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(text)


def check(versions):
    table = read_table()
    for version in versions or [next(iter(table)), list(table)[-1]]:
        packages, names = table[version]
        real = public(packages[-1], version)
        if real != names:
            only = f"only in the table: {sorted(names - real)}, only in the library: {sorted(real - names)}"
            sys.exit(f"tests/data/nccl-exports.txt is wrong about {version}: {only}")
        print(f"NCCL {version} ({packages[-1]}): {len(real)} public names, as in tests/data/nccl-exports.txt")


def main():
    mode, *versions = sys.argv[1:] or [""]
    try:
        if mode == "--check":
            check(versions)
        elif mode == "--write" and not versions:
            write()
        elif mode == "--new" and not versions:
            new = [version for version, _ in releases() if version not in read_table()]
            print("\n".join(new))
        else:
            sys.exit(__doc__)
    except pypi.Unreachable as error:
        print(f"NOT CHECKED, the package index cannot be reached: {error}")
        sys.exit(pypi.UNREACHABLE)


if __name__ == "__main__":
    main()
