"""The command `ebwm`, also as python -m ebwm_scale: one name for each thing that can be done.

    ebwm                     lists the commands
    ebwm COMMAND --help      what a command does, and its options

A command's module is imported when it is asked for, and not before: `ebwm --help` answers at once,
and a machine that only launches runs needs no PyTorch. Each is a program of its own as well,
`python -m ebwm_scale.COMMAND`.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from ebwm_scale.core.arguments import program_name, typed_as
from ebwm_scale.core.console import leave_quietly, say
from ebwm_scale.core.errors import EXIT_BAD_INPUT, EXIT_FINISHED
from ebwm_scale.core.plain_text import cut

COMMANDS = {  # name -> (module with a main, what it does)
    "train": ("ebwm_scale.train", "train an energy-based world model or the baseline"),
    "launch": ("ebwm_scale.launch", "submit runs and sweeps, to Slurm or in the background here"),
    "think": ("ebwm_scale.think", "continue a text or a clip, thinking as long as asked"),
    "explore": ("ebwm_scale.explore", "see a trained model think, in the browser"),
    "evaluate": ("ebwm_scale.evaluate", "losses with intervals, thinking curves, energies"),
    "questions": ("ebwm_scale.questions", "multiple choice and cloze from files"),
    "harness": ("ebwm_scale.harness", "lm-evaluation-harness on a trained model of text"),
    "plan": ("ebwm_scale.plan", "memory, time and cost of a run, before there is a cluster"),
    "plan-actions": (
        "ebwm_scale.plan_actions",
        "plan actions in an environment with a world model",
    ),
    "report": ("ebwm_scale.report", "write the report of a run: did it learn?"),
    "top": ("ebwm_scale.top", "a run as it trains, in the terminal"),
    "data-report": ("ebwm_scale.data_report", "what is in a dataset of text, as a page"),
    "doctor": ("ebwm_scale.doctor", "is this machine, or this job, ready to train?"),
    "config": ("ebwm_scale.config.__main__", "list, show and describe configurations"),
    "convert": ("ebwm_scale.convert", "runs into one folder and back, and the released EBT layout"),
}
VERSION = ("version", "the release, and the commit of a checkout")
EXTRAS = {"harness": "harness"}  # commands that need more than a plain installation
OLD_NAMES = {"configs": ["config", "list"]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    code = run(words)
    leave_quietly()
    return code


def run(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        say(usage())
        return EXIT_FINISHED
    name, *rest = [*OLD_NAMES.get(words[0], words[:1]), *words[1:]]
    if name in ("version", "--version"):
        from ebwm_scale.core.code_version import code_version

        say(f"ebwm_scale {code_version()}")
        return EXIT_FINISHED
    if name not in COMMANDS:
        near = difflib.get_close_matches(name[:80], [*COMMANDS, VERSION[0]], n=1)
        hint = f"is it {near[0]}? " if near else ""
        say(
            f"{typed()}: {cut(name)} is no command; {hint}known: "
            f"{', '.join([*COMMANDS, VERSION[0]])}",
            error=True,
        )
        return EXIT_BAD_INPUT
    module, _ = COMMANDS[name]
    with typed_as(f"{typed()} {name}"):
        try:
            loaded = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or name not in EXTRAS or error.name.startswith("ebwm"):
                raise
            say(
                f"{typed()} {name} needs the package {error.name}: "
                f"pip install 'ebwm_scale[{EXTRAS[name]}]'",
                error=True,
            )
            return EXIT_BAD_INPUT
        return loaded.main(rest)


def typed() -> str:
    """`ebwm`, or `python -m ebwm_scale`; `ebwm` where another program calls main."""
    name = program_name()
    return name if name == "python -m ebwm_scale" else "ebwm"


def usage() -> str:
    width = max(map(len, COMMANDS))
    rows = [(name, text) for name, (_, text) in COMMANDS.items()]
    lines = [f"  {name.ljust(width)}  {text}" for name, text in [*rows, VERSION]]
    return "\n".join(
        [
            f"usage: {typed()} COMMAND ...",
            "",
            "Pretraining of energy-based world models and Energy-Based Transformers.",
            "",
            *lines,
            "",
            f"{typed()} COMMAND --help says what a command takes.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
