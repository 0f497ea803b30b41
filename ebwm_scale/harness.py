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
from lm_eval.api.registry import register_model

from ebwm_scale.checkpoint.load import load_checkpoint
from ebwm_scale.core.arguments import command
from ebwm_scale.core.errors import EXIT_FINISHED, UserError
from ebwm_scale.inference.harness_model import TextModel
from ebwm_scale.inference.scoring import Scorer
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.think import manifest_of, tokenizer_of


@register_model("ebwm")
class HarnessModel(TextModel):
    """A run or checkpoint of ours as the harness sees it."""

    def __init__(
        self,
        checkpoint: str,
        data: str | None = None,
        batch_size: int | str = 8,
        device: str | None = None,
        max_batch_size: Any = None,
        **thinking: Any,
    ):
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model, config = load_checkpoint(checkpoint, device=self._device)
        if config.model.kind == "baseline" and thinking:
            raise UserError(
                f"{', '.join(thinking)}: a Transformer++ does not think; leave it out of "
                "model_args, or take an energy model"
            )
        try:
            rules = ThinkingConfig(**{"seed": config.train.seed, **thinking})
        except TypeError as error:
            raise UserError(
                f"model_args: {error}; known are checkpoint, data, batch_size, device and "
                f"{', '.join(ThinkingConfig.__dataclass_fields__)}"
            ) from None
        texts_at_a_time = 8  # the harness may say "auto"
        if str(batch_size).isdigit():
            texts_at_a_time = int(batch_size)
        tokenizer = None
        if config.state.kind == "vocabulary":
            manifest = manifest_of(argparse.Namespace(data=data, checkpoint=checkpoint), config)
            tokenizer = tokenizer_of(manifest)
        super().__init__(Scorer(model, tokenizer, rules, batch_size=texts_at_a_time))


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
