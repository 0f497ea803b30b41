"""lm-evaluation-harness on a trained model of text (optional: pip install 'ebwm_scale[harness]').

    ebwm harness run --model ebwm --model_args checkpoint=runs/mine,num_steps=4 --tasks my_task
                     --include_path tasks/

is the harness's own command line with the model `ebwm` registered. model_args: checkpoint
(required), data (a manifest, if the dataset has moved), batch_size, device, and the fields of
ThinkingConfig (num_steps, step_size, noise, num_starts, accept_only_if_lower, tolerance, seed).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from ebwm_scale.checkpoint.load import load_checkpoint
from ebwm_scale.core.arguments import command
from ebwm_scale.core.errors import EXIT_FINISHED, UserError
from ebwm_scale.inference.generation import Sampling, continue_texts
from ebwm_scale.inference.scoring import Scorer
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.think import manifest_of, tokenizer_of

MAX_NEW = 256  # tokens, where a task does not say


@register_model("ebwm")
class HarnessModel(LM):
    """A run or checkpoint of ours as the harness sees it: text in, log-likelihoods and text out."""

    def __init__(
        self,
        checkpoint: str,
        data: str | None = None,
        batch_size: int | str = 8,
        device: str | None = None,
        max_batch_size: Any = None,
        **thinking: Any,
    ):
        super().__init__()
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model, config = load_checkpoint(checkpoint, device=self._device)
        if config.model.kind == "baseline" and thinking:
            raise UserError(
                f"{', '.join(thinking)}: a Transformer++ does not think; leave it out of "
                "model_args, or take an energy model"
            )
        try:
            self.rules = ThinkingConfig(**{"seed": config.train.seed, **thinking})
        except TypeError as error:
            raise UserError(
                f"model_args: {error}; known are checkpoint, data, batch_size, device and "
                f"{', '.join(ThinkingConfig.__dataclass_fields__)}"
            ) from None
        self.batch_size = 8  # the harness may say "auto"
        if str(batch_size).isdigit():
            self.batch_size = int(batch_size)
        tokenizer = None
        if config.state.kind == "vocabulary":
            manifest = manifest_of(argparse.Namespace(data=data, checkpoint=checkpoint), config)
            tokenizer = tokenizer_of(manifest)
        self.scorer = Scorer(self.model, tokenizer, self.rules, batch_size=self.batch_size)

    @property
    def tokenizer_name(self) -> str:
        return str(self.scorer.tokenizer.path)

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        pairs = [(str(request.args[0]), str(request.args[1])) for request in requests]
        scores = [(score.log_likelihood, score.is_greedy) for score in self.scorer.score(pairs)]
        self._remember("loglikelihood", requests, scores)
        return scores

    def loglikelihood_rolling(self, requests) -> list[float]:
        scores = [
            score.log_likelihood
            for score in self.scorer.score([("", request.args[0]) for request in requests])
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


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The harness's own command line, which reads sys.argv."""
    from lm_eval.__main__ import cli_evaluate

    if arguments is not None:
        sys.argv[1:] = arguments
    cli_evaluate()
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
