"""Questions from files of JSON lines, and what a model of text answers: a number for each question.

multiple choice {"context": "The capital of France is", "choices": [" Rome", " Paris"],
                 "answer": 1}
cloze           {"context": "Two and two are", "answer": " four"}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import shown
from ebwm_scale.data.tokenizer import check_text
from ebwm_scale.inference.scoring import ContinuationScore

Question = dict[str, Any]


class ScoresPairs(Protocol):
    """What a Scorer does (inference/scoring.py)."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[ContinuationScore]: ...


def read_questions(file: Path, kind: str) -> list[dict[str, Any]]:
    """The questions of a file; kind: "choices" (multiple choice) or "answer" (cloze).

    Raises DataError naming file, line and what is wrong.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text: {error}") from None
    questions = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                question = json.loads(line)
            except ValueError as error:
                raise DataError(f"{file}, line {number}: not JSON: {error}") from None
            except RecursionError:
                raise DataError(
                    f"{file}, line {number}: JSON nested too deeply for a question; see "
                    "python -m ebwm_scale.questions --help"
                ) from None
            wrong = _what_is_wrong(question, kind)
            if wrong:
                raise DataError(
                    f"{file}, line {number}: {wrong}; see python -m ebwm_scale.questions --help"
                )
            for name, text in _texts_of(question, kind):
                check_text(text, f"{file}, line {number}: {name}")
            questions.append(question)
    if not questions:
        raise DataError(f"{file}: holds no question")
    return questions


def _what_is_wrong(question: Any, kind: str) -> str | None:
    if not isinstance(question, dict) or not isinstance(question.get("context"), str):
        return 'expected an object with a text "context"'
    if kind == "answer":
        return (
            None
            if isinstance(question.get("answer"), str) and question["answer"]
            else f"answer is {shown(question.get('answer'))}: must be a text that is not empty"
        )
    choices, answer = question.get("choices"), question.get("answer")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        return f"choices is {shown(choices)}: must be two or more texts that are not empty"
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        return f"answer is {shown(answer)}: must be the index of a choice, 0 to {len(choices) - 1}"
    return None


def _texts_of(question: dict[str, Any], kind: str) -> list[tuple[str, str]]:
    """(name, text) of what is given to the tokenizer."""
    if kind == "answer":
        return [("context", question["context"]), ("answer", question["answer"])]
    choices = [(f"choice {i}", choice) for i, choice in enumerate(question["choices"])]
    return [("context", question["context"]), *choices]


def multiple_choice_values(scorer: ScoresPairs, questions: Sequence[Question]) -> dict[str, Tensor]:
    """By measure, for each question 1 where its right choice is the best one, else 0 (float64).

    accuracy: by log-likelihood; accuracy_per_byte; of an energy model accuracy_by_energy.
    """
    pairs = [
        (question["context"], choice) for question in questions for choice in question["choices"]
    ]
    scores = iter(scorer.score(pairs))
    by_question = [[next(scores) for _ in question["choices"]] for question in questions]

    def is_right(better: Callable[[ContinuationScore], float]) -> Tensor:
        right = [
            max(range(len(row)), key=lambda i: better(row[i])) == question["answer"]
            for row, question in zip(by_question, questions)
        ]
        return torch.tensor(right, dtype=torch.float64)

    result = {
        "accuracy": is_right(lambda score: score.log_likelihood),
        "accuracy_per_byte": is_right(lambda score: score.log_likelihood / score.num_bytes),
    }

    def lowest_energy(score: ContinuationScore) -> float:
        assert score.energy is not None, "a model gives it for all texts or for none"
        return -score.energy

    if by_question[0][0].energy is not None:
        result["accuracy_by_energy"] = is_right(lowest_energy)
    return result


def cloze_values(scorer: ScoresPairs, questions: Sequence[Question]) -> dict[str, Tensor]:
    """accuracy: for each question 1 where greedy choice writes the answer, else 0; nats_per_token
    of each answer (float64).
    """
    scores = scorer.score([(question["context"], question["answer"]) for question in questions])
    nats = [-score.log_likelihood / score.num_tokens for score in scores]
    return {
        "accuracy": torch.tensor([score.is_greedy for score in scores], dtype=torch.float64),
        "nats_per_token": torch.tensor(nats, dtype=torch.float64),
    }


def chance(questions: Sequence[Question]) -> float:
    """The share that is right by guessing."""
    return sum(1 / len(question["choices"]) for question in questions) / len(questions)
