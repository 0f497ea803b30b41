"""The command line of every entry point: argparse, with one line for each mistake and numbers that
are numbers.

float and int options refuse nan, infinities and what no 64 bits hold: they would pass every
comparison, or fail far from here. Path options refuse the empty text, mostly a shell variable that
is not set: it would mean the current folder.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ebwm_scale.core.errors import EXIT_BAD_INPUT, cut

LARGEST_INT = 2**63 - 1
_MESSAGE_LENGTH = 400


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with these types for float, int and Path, and errors of one line (exit code 2)."""

    def __init__(self, *arguments, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*arguments, **options)
        self.register("type", float, finite_number)
        self.register("type", int, whole_number)
        self.register("type", Path, some_path)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: {cut(message, _MESSAGE_LENGTH)}; see --help\n")


def finite_number(text: str) -> float:
    """A number as it is typed on a command line."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{cut(text)} is no finite number")
    return value


def whole_number(text: str) -> int:
    """A whole number of at most 64 bits."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{cut(text)} is no whole number") from None
    if abs(value) > LARGEST_INT:
        raise argparse.ArgumentTypeError(f"{cut(text)} is beyond 64 bits")
    return value


class OldOption(argparse.Action):
    """An option under its old name: still taken, said to be old, not in --help.

    const: the new name; dest: where the new one is kept.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, const: str, **options):
        options |= {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        super().__init__(option_strings, dest, const=const, **options)

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        print(f"{option_string} is the old name of {self.const}", file=sys.stderr)
        setattr(namespace, self.dest, values)


def some_path(text: str) -> Path:
    """A path that was really given."""
    if not text.strip():
        raise argparse.ArgumentTypeError("empty: name a file or a folder")
    return Path(text)
