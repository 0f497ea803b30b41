"""The command line of every entry point: argparse, with one line for each mistake, numbers that are
numbers, and one way to end on a user's error.

    @command
    def main(arguments: Sequence[str] | None = None) -> int:
        parser = ArgumentParser(description=__doc__)
        ...
        return EXIT_FINISHED

float and int options refuse nan, infinities and what no 64 bits hold: they would pass every
comparison, or fail far from here. Path options refuse the empty text, mostly a shell variable that
is not set: it would mean the current folder.

Why argparse, and not typer or tyro. deepspeed and srun put flags of theirs before ours
(--local_rank), and one --set takes several values: argparse takes both, and click, on which typer
stands, has no option with any number of values. A mistake is one line here, which a job's log shows
whole, not a framed box. `ebwm --help` takes 0.07 s, as only the standard library is imported for
it; importing typer alone takes 0.1 s. tyro makes options of a configuration's types, and here the
configuration is read by pydantic, from files and --set. What is ours beside argparse is this page.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, ParamSpec

from ebwm_scale.core.console import say
from ebwm_scale.core.errors import EXIT_BAD_INPUT, UserError
from ebwm_scale.core.plain_text import cut

LARGEST_INT = 2**63 - 1
_MESSAGE_LENGTH = 400
_typed_program: str | None = None  # "ebwm think", while the dispatcher runs it
Parameters = ParamSpec("Parameters")


def command(main: Callable[Parameters, int]) -> Callable[Parameters, int]:
    """A command's main: a UserError becomes its text on stderr, said by rank 0, and its exit code.

    What is no UserError is a defect of ours, and keeps its traceback.
    """

    @functools.wraps(main)
    def run(*arguments: Parameters.args, **options: Parameters.kwargs) -> int:
        try:
            return main(*arguments, **options)
        except UserError as error:
            say(str(error), error=True)
            return error.exit_code

    return run


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with these types for float, int and Path, and errors of one line (exit code 2).

    The program is what was typed: `ebwm think`, `python -m ebwm_scale.think` or the file's name.
    Descriptions write `ebwm COMMAND`; help shows the typed one in its place.
    """

    def __init__(self, *arguments, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        options.setdefault("prog", program_name())
        super().__init__(*arguments, **options)
        self.register("type", float, finite_number)
        self.register("type", int, whole_number)
        self.register("type", Path, some_path)
        own_name = self.prog.replace(".", " ").split()[-1]
        if self.description is not None:
            self.description = self.description.replace(f"ebwm {own_name}", self.prog)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: {cut(message, _MESSAGE_LENGTH)}; see --help\n")


def program_name() -> str:
    """What was typed to start this program, for its help and its errors."""
    if _typed_program is not None:
        return _typed_program
    specification = getattr(sys.modules["__main__"], "__spec__", None)
    if specification is not None:  # python -m
        return f"python -m {specification.name.removesuffix('.__main__')}"
    return Path(sys.argv[0]).name


@contextmanager
def typed_as(program: str) -> Iterator[None]:
    """Within the block, program_name() is this."""
    global _typed_program  # noqa: PLW0603  a process has one command line
    before = _typed_program
    _typed_program = program
    try:
        yield
    finally:
        _typed_program = before


def add_config(
    parser: argparse._ActionsContainer,
    meaning: str = "YAML: a file, or a shipped one: python -m ebwm_scale configs",
    *,
    required: bool = False,
) -> None:
    """--config FILE, as options.config."""
    options: dict[str, Any] = {"required": True} if required else {"default": None}
    parser.add_argument("--config", metavar="FILE", help=meaning, **options)


def add_overrides(parser: argparse.ArgumentParser, meaning: str = "wins over the file") -> None:
    """--set section.key=value ..., any number of times; a list of texts as options.overrides."""
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help=meaning,
    )


def add_weights(parser: argparse._ActionsContainer) -> None:
    """--weights trained|ema, as options.weights."""
    parser.add_argument(
        "--weights",
        choices=("trained", "ema"),
        default="trained",
        help="of the checkpoint: as trained, or their average (a run with train.ema)",
    )


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
        say(f"{option_string} is the old name of {self.const}", error=True)
        setattr(namespace, self.dest, values)


def some_path(text: str) -> Path:
    """A path that was really given."""
    if not text.strip():
        raise argparse.ArgumentTypeError("empty: name a file or a folder")
    return Path(text)
