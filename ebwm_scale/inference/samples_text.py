"""Continuations of held-out text, with the candidates a model considered and their energies: what a
person reads in a report.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ebwm_scale.config import resolved
from ebwm_scale.data.format.scored import plain_tokens
from ebwm_scale.data.tokenizer import open_tokenizer
from ebwm_scale.inference.generation import Session, candidate_energies
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.world_model import WorldModel


def sample_continuations(
    model: WorldModel,
    split,
    *,
    seed: int,
    num_samples: int = 3,
    num_tokens: int = 24,
    num_shown: int = 6,
    num_candidates: int = 5,
) -> list[dict[str, Any]]:
    """Greedy continuations of validation blocks, for samples.json: half of a block as prompt,
    candidates of the first positions.
    """
    was_training = model.training
    model.eval()
    content = split.manifest.content
    tokenizer = open_tokenizer(content.tokenizer_path, eos_id=content.eos_id)
    length = resolved.context_length(model.config)
    results = []
    for sample_id in [
        int(i * len(split) / num_samples) for i in range(min(num_samples, len(split)))
    ]:
        stored = plain_tokens(split.read(sample_id)).astype("int64")
        block = torch.from_numpy(stored)[: length + 1]
        start = max(1, length // 2)
        session = Session(
            model, [block[:start]], ThinkingConfig(seed=seed), sample_ids=torch.tensor([sample_id])
        )
        tokens, positions = block[:start], []
        for index in range(min(num_tokens, length)):
            logits = session.predict().state[0].float().cpu()
            if index < num_shown:
                positions.append(
                    _position(
                        model,
                        tokenizer,
                        session.rows[0],
                        logits,
                        block,
                        start + index,
                        tokens,
                        num_candidates,
                    )
                )
            token = logits.argmax()[None]
            tokens = torch.cat([tokens, token])
            session.accept(token)
        results.append(
            {
                "prompt": tokenizer.decode(block[:start].tolist()),
                "continuation": tokenizer.decode(tokens[start:].tolist()),
                "reference": tokenizer.decode(block[start : start + num_tokens].tolist()),
                "positions": positions,
            }
        )
    model.train(was_training)
    return results


def _position(
    model,
    tokenizer,
    window: Tensor,
    logits: Tensor,
    block: Tensor,
    place: int,
    tokens: Tensor,
    num_candidates: int,
) -> dict:
    """One predicted position: its most probable candidates, and the true token while the
    continuation still follows the text.
    """
    top = logits.softmax(-1).topk(num_candidates)
    follows = place < len(block) and torch.equal(tokens, block[:place])
    asked = top.indices
    if follows:
        asked = torch.cat([asked, block[place : place + 1]])
    energies = [None] * len(asked)
    if model.config.model.kind == "energy":  # each as a certain prediction
        energies = candidate_energies(
            model, window, model.state_space().weight[asked.to(window.device)]
        ).tolist()
    return {
        "context": tokenizer.decode(tokens[-12:].tolist()),
        "truth": tokenizer.piece(int(block[place])) if follows else None,
        "truth_energy": energies[-1] if follows else None,
        "candidates": [
            {"token": tokenizer.piece(int(token)), "probability": float(p), "energy": e}
            for token, p, e in zip(top.indices, top.values, energies)
        ],
    }
