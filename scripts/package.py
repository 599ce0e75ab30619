#!/usr/bin/env python3
"""Makes the wheel and the tarball out of a built libtwoshot.so and twoshot. Needs nothing but Python and a C compiler.

Usage: scripts/package.py --from FOLDER --out FOLDER [--platform TAG] [--cc COMMAND] [--strip COMMAND]

Both hold one tree: bin/twoshot, lib/libtwoshot.so and, for NCCL_NET_PLUGIN=twoshot and NCCL_TUNER_PLUGIN=twoshot, two
libraries of a few kilobytes that hold nothing and depend on libtwoshot.so beside them. Wheels cannot hold links, and
copies would be second instances of the library in a process that opens it under two names.
"""

import argparse
import base64
import gzip
import hashlib
import io
import pathlib
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
NAMES = ("libnccl-net-twoshot.so", "libnccl-tuner-twoshot.so")
# Archives of the same files are the same bytes.
DATE, DATED = (2020, 1, 1, 0, 0, 0), 1577836800


def version():
    return re.search(r'^version = "(.*)"$', (ROOT / "Cargo.toml").read_text(), re.M)[1]


def tree(built, into, cc, strip):
    """Fills `into` with bin/ and lib/."""
    for name, folder in (("twoshot", "bin"), ("libtwoshot.so", "lib")):
        (into / folder).mkdir()
        target = into / folder / name
        shutil.copy(built / name, target)
        target.chmod(0o755)
        if strip:
            subprocess.run([*shlex.split(strip), target], check=True)
    (into / "empty.c").write_text("")
    for name in NAMES:
        # libtwoshot.so stands here without a path, so that what is written down is a name for $ORIGIN to answer; by the
        # old tag, which LD_LIBRARY_PATH does not override.
        link = ["-shared", "-nostdlib", "-o", name, "../empty.c", f"-Wl,-soname,{name}"]
        link += ["-Wl,-rpath,$ORIGIN", "-Wl,--disable-new-dtags", "-Wl,-z,nodelete", "-Wl,--no-as-needed"]
        link.append("libtwoshot.so")
        subprocess.run([*shlex.split(cc), *link], check=True, cwd=into / "lib")
        (into / "lib" / name).chmod(0o755)
    (into / "empty.c").unlink()


def metadata(platform):
    about = f"""\
Metadata-Version: 2.1
Name: twoshot
Version: {version()}
Summary: AllReduce for NVLink domains as an NCCL plugin
License: Apache-2.0
Requires-Python: >=3.9
Description-Content-Type: text/markdown

{(ROOT / "README.md").read_text()}"""
    wheel = f"Wheel-Version: 1.0\nGenerator: twoshot\nRoot-Is-Purelib: false\nTag: py3-none-{platform}\n"
    scripts = "[console_scripts]\ntwoshot = twoshot.__main__:main\n"
    texts = {"METADATA": about, "WHEEL": wheel, "entry_points.txt": scripts}
    licences = {name: (ROOT / name).read_text() for name in ("LICENSE", "NOTICE")}
    return {**texts, **licences}


def write_wheel(files, platform, out):
    info = f"twoshot-{version()}.dist-info"
    members = [(f"twoshot/{path.name}", path) for path in sorted((ROOT / "packaging/python/twoshot").glob("*.py"))]
    members += [(f"twoshot/{path.relative_to(files)}", path) for path in sorted(files.rglob("*")) if path.is_file()]
    contents = [(name, path.read_bytes(), path.stat().st_mode & 0o111) for name, path in members]
    contents += [(f"{info}/{name}", text.encode(), 0) for name, text in metadata(platform).items()]
    record = ""
    target = out / f"twoshot-{version()}-py3-none-{platform}.whl"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:

        def add(name, data, executable):
            entry = zipfile.ZipInfo(name, DATE)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o100755 if executable else 0o100644) << 16
            archive.writestr(entry, data)

        for name, data, executable in contents:
            add(name, data, executable)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record += f"{name},sha256={digest},{len(data)}\n"
        add(f"{info}/RECORD", (record + f"{info}/RECORD,,\n").encode(), False)
    return target


def write_tarball(files, platform, out):
    stem = f"twoshot-{version()}-{platform}"
    target = out / f"{stem}.tar.gz"
    members = [(str(path.relative_to(files)), path) for path in sorted(files.rglob("*")) if path.is_file()]
    members += [(name, ROOT / name) for name in ("LICENSE", "NOTICE", "README.md", "CHANGELOG.md", "include/twoshot.h")]
    members += [(f"docs/{path.name}", path) for path in sorted((ROOT / "docs").glob("*.md"))]
    with gzip.GzipFile(target, "wb", mtime=DATED) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        for name, path in members:
            data = path.read_bytes()
            entry = tarfile.TarInfo(f"{stem}/{name}")
            entry.size, entry.mtime = len(data), DATED
            entry.mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
            archive.addfile(entry, io.BytesIO(data))
    return target


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="built", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--platform", default="linux_x86_64")
    parser.add_argument("--cc", default="cc")
    parser.add_argument("--strip", default="")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        files = pathlib.Path(folder)
        tree(options.built, files, options.cc, options.strip)
        for write in (write_wheel, write_tarball):
            print(write(files, options.platform, options.out))


if __name__ == "__main__":
    main()
