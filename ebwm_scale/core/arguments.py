"""The command line of every entry point: argparse, with one line for each mistake and numbers that
are numbers.

float and int options refuse nan, infinities and what no 64 bits hold: they would pass every
comparison, or fail far from here. Path options refuse the empty text, mostly a shell variable that
is not set: it would mean the current folder.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NoReturn

from ebwm_scale.core.errors import EXIT_BAD_INPUT
from ebwm_scale.core.plain_text import cut

LARGEST_INT = 2**63 - 1
_MESSAGE_LENGTH = 400


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with these types for float, int and Path; an error is one line, exit code 2."""

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


def some_path(text: str) -> Path:
    """A path that was really given."""
    if not text.strip():
        raise argparse.ArgumentTypeError("empty: name a file or a folder")
    return Path(text)
