"""Multiple choice and cloze from files: how often a model of text prefers, or writes, the right
answer.

    ebwm questions RUN [--multiple-choice FILE ...] [--cloze FILE ...]
                       [thinking options of ebwm think]

One JSON object per line; other keys are ignored. A text is continued as it stands: a space before
an answer belongs to the answer.

    multiple choice {"context": "The capital of France is", "choices": [" Rome", " Paris"],
                     "answer": 1}
    cloze           {"context": "Two and two are", "answer": " four"}

Multiple choice: the share of questions whose right choice has the highest log-likelihood
(`accuracy`), the highest per byte (`accuracy_per_byte`), and, of an energy model, the lowest mean
energy of its tokens (`accuracy_by_energy`), beside `chance`. Cloze: the share of answers that
greedy choice writes (`accuracy`), and nats per token of the answers. 95 % intervals from a
bootstrap over questions. Written to questions.json in RUN (or --output FILE).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ebwm_scale.checkpoint.load import load_checkpoint
from ebwm_scale.core.arguments import ArgumentParser, add_weights, command
from ebwm_scale.core.console import say
from ebwm_scale.core.errors import EXIT_FINISHED, UserError
from ebwm_scale.evaluation.bootstrap import bootstrap_ci
from ebwm_scale.inference.question_files import (
    chance,
    cloze_values,
    multiple_choice_values,
    read_questions,
)
from ebwm_scale.inference.scoring import Scorer
from ebwm_scale.think import add_thinking_options, manifest_of, rules_of, tokenizer_of


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="run folder or checkpoint folder"
    )
    add_weights(parser)
    parser.add_argument("--multiple-choice", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--cloze", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument(
        "--data", metavar="MANIFEST", help="the dataset's manifest, if it has moved since training"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="texts at a time (default %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=None,
        metavar="N",
        help="of noise and initial states (default: the run's)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        metavar="FILE",
        help="default: questions.json in the run folder",
    )
    add_thinking_options(parser)
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        raise UserError(f"--batch-size is {options.batch_size}: must be at least 1")
    if not options.multiple_choice and not options.cloze:
        raise UserError("nothing to ask: give --multiple-choice FILE or --cloze FILE")
    asked = [
        ("multiple_choice", file, read_questions(file, "choices"))
        for file in options.multiple_choice
    ]
    asked += [("cloze", file, read_questions(file, "answer")) for file in options.cloze]
    model, config = load_checkpoint(
        options.checkpoint,
        device="cuda" if torch.cuda.is_available() else "cpu",
        weights=options.weights,
    )
    rules = rules_of(options, config)
    tokenizer = None
    if config.state.kind == "vocabulary":
        tokenizer = tokenizer_of(manifest_of(options, config))
    scorer = Scorer(model, tokenizer, rules, batch_size=options.batch_size)
    result: dict[str, Any] = {
        "checkpoint": str(options.checkpoint),
        "weights": options.weights,
        "kind": config.model.kind,
        "thinking": vars(rules),
        "multiple_choice": [],
        "cloze": [],
    }
    ask = {"multiple_choice": multiple_choice, "cloze": cloze}
    for kind, file, questions in asked:
        row = {"file": str(file), "num_questions": len(questions)} | ask[kind](scorer, questions)
        result[kind].append(row)
        say(f"{file}: {_in_words(row)}")
    output = options.output or options.checkpoint / "questions.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    return EXIT_FINISHED


def _in_words(row: dict[str, Any]) -> str:
    """The figures of a file of questions, those with an interval with it."""
    parts = []
    for name, value in row.items():
        if name == "file":
            continue
        figure = f"{name.replace('_', ' ')} "
        if isinstance(value, dict):
            figure += f"{value['mean']:.4g} [{value['low']:.4g}, {value['high']:.4g}]"
        else:
            figure += f"{value:.4g}"
        parts.append(figure)
    return "; ".join(parts)


def multiple_choice(scorer: Scorer, questions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares of questions answered right, each with its interval."""
    values = multiple_choice_values(scorer, questions)
    result: dict[str, Any] = {name: bootstrap_ci(of_each) for name, of_each in values.items()}
    return result | {"chance": chance(questions)}


def cloze(scorer: Scorer, questions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The share of answers that greedy choice writes, and nats per token of the answers (a mean
    over questions).
    """
    values = cloze_values(scorer, questions)
    return {name: bootstrap_ci(of_each) for name, of_each in values.items()}


if __name__ == "__main__":
    sys.exit(main())
