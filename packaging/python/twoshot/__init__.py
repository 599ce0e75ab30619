"""AllReduce for NVLink domains, as a library that NCCL loads. Nothing here has to be imported by a program that uses it.

`twoshot.library()` is the path of libtwoshot.so; `python -m twoshot.env` prints what switches it on.
"""

import pathlib

_FOLDER = pathlib.Path(__file__).resolve().parent


def library():
    """The path of libtwoshot.so."""
    return str(_FOLDER / "lib" / "libtwoshot.so")


def program():
    """The path of the command line program, `twoshot`."""
    return str(_FOLDER / "bin" / "twoshot")
