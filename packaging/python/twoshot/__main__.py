"""The command `twoshot`: the program of this package, in this process."""

import os
import sys

from . import program


def main():
    os.execv(program(), ["twoshot", *sys.argv[1:]])


if __name__ == "__main__":
    main()
