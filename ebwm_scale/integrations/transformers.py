"""A converted folder as a transformers model (optional: pip install transformers).

    from ebwm_scale.integrations.transformers import EbwmModel
    model = EbwmModel.from_pretrained("converted/")
    logits = model(input_ids=torch.tensor([[5, 7, 9]])).logits

Once this module is imported, AutoModel.from_pretrained does the same. Of a video model:
model(inputs_embeds=states).predictions.

The prediction after each position, refined with as many steps as were trained, or num_steps.
Training goes through ebwm_scale/train.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ebwm_scale.checkpoint.model_folder import MODEL_TYPE
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.data.format.manifest import MANIFEST_NAME
from ebwm_scale.data.format.side_files import open_manifest
from ebwm_scale.inference.scoring import last_states
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.world_model import WorldModel


class EbwmConfig(PretrainedConfig):
    """ebwm: the resolved configuration as a mapping, as in config.yaml."""

    model_type = MODEL_TYPE

    def __init__(self, ebwm: dict | None = None, **rest):
        self.ebwm = ebwm or {}
        super().__init__(**rest)


@dataclass
class Prediction(ModelOutput):
    """logits (B, S, V) of text; predictions (B, S, dimension) of video."""

    logits: Tensor | None = None
    predictions: Tensor | None = None


class EbwmModel(PreTrainedModel):
    config_class = EbwmConfig
    base_model_prefix = "world_model"  # names in the file are the world model's own

    def __init__(self, config: EbwmConfig):
        super().__init__(config)
        self.world_model = WorldModel(config_from_dict(config.ebwm))
        self.post_init()

    @classmethod
    def from_pretrained(cls, folder: Any, *arguments: Any, **options: Any) -> EbwmModel:
        """DataError if the tokenizer or encoder that the folder carries is not the model's own."""
        manifest = Path(str(folder)) / "data" / MANIFEST_NAME
        if manifest.exists():
            open_manifest(manifest)
        return super().from_pretrained(folder, *arguments, **options)

    def _init_weights(self, module):
        """WorldModel has initialised itself."""

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        num_steps: int | None = None,
        conditions: dict[str, Tensor] | None = None,
        **_,
    ) -> Prediction:
        """input_ids (B, S) of text, or inputs_embeds (B, S, dimension) of video; conditions of its
        frames, by name (model/conditions.py).
        """
        text = self.world_model.config.state.kind == "vocabulary"
        observed = input_ids if text else inputs_embeds
        if observed is None:
            raise ValueError(
                f"a model of {'text' if text else 'video'} needs "
                f"{'input_ids' if text else 'inputs_embeds'}"
            )
        state = last_states(
            self.world_model,
            observed,
            ThinkingConfig(num_steps=num_steps, seed=self.world_model.config.train.seed),
            conditions,
        )
        return Prediction(logits=state) if text else Prediction(predictions=state)


AutoConfig.register(MODEL_TYPE, EbwmConfig)
AutoModel.register(EbwmConfig, EbwmModel)
