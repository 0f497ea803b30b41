"""A model of text as lm-evaluation-harness sees it: text in, log-likelihoods and text out.

Needs the extra `harness`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.model import LM

from ebwm_scale.inference.generation import Sampling, continue_texts
from ebwm_scale.inference.scoring import ContinuationScore, Scorer

MAX_NEW = 256  # tokens, where a task does not say
Score = Callable[[Sequence[tuple[str, str]]], list[ContinuationScore]]


class TextModel(LM):
    """scorer: of the model. score: what scores pairs in its place, such as all ranks together."""

    def __init__(self, scorer: Scorer, score: Score | None = None):
        super().__init__()
        self.scorer = scorer
        self.score = score or scorer.score
        self.model, self.rules = scorer.model, scorer.config
        self.batch_size = scorer.batch_size

    @property
    def tokenizer_name(self) -> str:
        return str(self.scorer.tokenizer.path)

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        pairs = []
        for request in requests:
            context, continuation = list(request.args)
            pairs.append((str(context), str(continuation)))
        scores = [(score.log_likelihood, score.is_greedy) for score in self.score(pairs)]
        self._remember("loglikelihood", requests, scores)
        return scores

    def loglikelihood_rolling(self, requests) -> list[float]:
        scores = [
            score.log_likelihood
            for score in self.score([("", request.args[0]) for request in requests])
        ]
        self._remember("loglikelihood_rolling", requests, scores)
        return scores

    def generate_until(self, requests) -> list[str]:
        texts = [self._generate(*request.args) for request in requests]
        self._remember("generate_until", requests, texts)
        return texts

    def _generate(self, prompt: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        sampled = options.get("do_sample", False) or options.get("temperature", 0) > 0
        sampling = Sampling(
            options.get("temperature", 1.0) if sampled else 0.0,
            options.get("top_k"),
            options.get("top_p"),
            self.rules.seed,
        )
        tokenizer = self.scorer.tokenizer
        tokens = torch.tensor(tokenizer.encode(prompt) or [tokenizer.eos_id])
        new, text = [], ""
        for chosen, _ in continue_texts(
            self.model,
            [tokens],
            options.get("max_gen_toks", MAX_NEW),
            config=self.rules,
            sampling=sampling,
            end=tokenizer.eos_id,
        ):
            if int(chosen) == tokenizer.eos_id:
                break
            new.append(int(chosen))
            text = tokenizer.decode(new)
            ends = [text.index(stop) for stop in until if stop in text]
            if ends:
                return text[: min(ends)]
        return text

    def _remember(self, kind: str, requests, answers) -> None:
        for request, answer in zip(requests, answers):
            self.cache_hook.add_partial(kind, request.args, answer)
