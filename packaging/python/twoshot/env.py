"""Switches twoshot on for a shell or for one command, as `twoshot run` does.

eval "$(python -m twoshot.env)"             for all that this shell starts from now on
python -m twoshot.env COMMAND [ARGUMENT]... for one command

Options are those of `twoshot run`, such as --door preload; they come first.
"""

import os
import sys

from . import program

WITH_VALUE = ("--door", "--library", "--nccl")


def words(arguments):
    """The words behind `twoshot run`: without a command it is to print."""
    at = 0
    while at < len(arguments) and arguments[at].startswith("-") and arguments[at] != "--":
        at += 2 if arguments[at] in WITH_VALUE else 1
    options, command = arguments[:at], arguments[at:]
    if command[:1] == ["--"]:
        command = command[1:]
    if command or {"--help", "-h", "--print"} & set(options):
        return [*options, "--", *command] if command else options
    return [*options, "--print"]


def main():
    os.execv(program(), ["twoshot", "run", *words(sys.argv[1:])])


if __name__ == "__main__":
    main()
