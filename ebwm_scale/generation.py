"""Continuations of real text, with the candidates a model considered and their energies: what a person reads in a report."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .data.mixing import MixedSplit
from .data.tokenizer import Tokenizer
from .draws import SampledDraws
from .model.world_model import WorldModel
from .noise import NoiseSource
from .refinement import refine
from .training.validation import EVALUATION_STEP


@torch.no_grad()
def next_token_logits(model: WorldModel, tokens: Tensor, source: NoiseSource, sample_id: int = 0) -> Tensor:
    """Logits (V,) of the token after tokens (S,), refined with the largest number of steps (energy) or predicted directly."""
    tokens = tokens[None]
    embedded = model.embed_observed(tokens)
    if model.config.model.kind == "baseline":
        return model.output(model.network(embedded))[0, -1].float()
    rules = model.config.refinement
    draws = SampledDraws(source, rules, torch.tensor([sample_id]), (1, tokens.shape[1], model.state.size), kind=model.config.state.initial,
                         randomize=False, device=tokens.device)
    result = refine(model, embedded, None, rules=rules, landscapes=model.landscapes(rules.num_steps), draws=draws, training=False, keep_state=torch.float32)
    return result.state[0, -1].float()


@torch.no_grad()
def candidate_energies(model: WorldModel, tokens: Tensor, candidates: Tensor) -> Tensor:
    """Energies (K,) in the last landscape of candidate next tokens (K,), each as a certain prediction, after tokens (S,)."""
    observed = model.embed_observed(tokens.expand(len(candidates), -1))
    landscape = model.network.num_landscapes - 1
    context = model.network.encode(observed, landscape)
    certain = model.state.weight[candidates][:, None].expand_as(observed)      # only the last position is read, and positions are separate
    return model.network.energy(model.predicted_rows(certain, observed), context, landscape)[:, -1].float()


def samples_to_look_at(model: WorldModel, split, *, seed: int) -> dict[str, Any]:
    """What samples.json holds beside the step: {"continuations": [...]} of text, {"clips": [...]} of video (generation_video.py)."""
    split = split.parts[0] if isinstance(split, MixedSplit) else split
    if split.manifest.modality == "video":
        from .generation_video import sample_clips
        return {"clips": sample_clips(model, split, seed=seed)}
    return {"continuations": sample_continuations(model, Tokenizer(split.manifest.content.tokenizer_path), split, seed=seed)}


def sample_continuations(model: WorldModel, tokenizer, split, *, seed: int, num_samples: int = 3, num_tokens: int = 24,
                         num_shown: int = 6, num_candidates: int = 5) -> list[dict[str, Any]]:
    """Greedy continuations of validation blocks, for samples.json: half of a block as prompt, candidates of the first positions."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    length, source, energy = model.config.data.context_length, NoiseSource(seed, EVALUATION_STEP), model.config.model.kind == "energy"
    results = []
    for sample_id in [int(i * len(split) / num_samples) for i in range(min(num_samples, len(split)))]:
        block = torch.from_numpy(split.read(sample_id).astype("int64"))[:length + 1].to(device)
        start = max(1, length // 2)
        tokens, positions = block[:start], []
        for index in range(min(num_tokens, length)):
            window = tokens[-length:]
            logits = next_token_logits(model, window, source, sample_id)
            if index < num_shown:
                positions.append(_position(model, tokenizer, window, logits, block, start + index, tokens, num_candidates, energy))
            tokens = torch.cat([tokens, logits.argmax()[None]])
        results.append({"prompt": tokenizer.decode(block[:start].tolist()), "continuation": tokenizer.decode(tokens[start:].tolist()),
                        "reference": tokenizer.decode(block[start:start + num_tokens].tolist()), "positions": positions})
    model.train(was_training)
    return results


def _position(model, tokenizer, window: Tensor, logits: Tensor, block: Tensor, place: int, tokens: Tensor, num_candidates: int, energy: bool) -> dict:
    """One predicted position: its most probable candidates, and the true token while the continuation still follows the text."""
    probabilities = logits.softmax(-1)
    top = probabilities.topk(num_candidates)
    follows = place < len(block) and torch.equal(tokens, block[:place])
    truth = block[place:place + 1] if follows else None
    asked = top.indices if truth is None else torch.cat([top.indices, truth])
    energies = candidate_energies(model, window, asked).tolist() if energy else [None] * len(asked)
    return {"context": tokenizer.decode(tokens[-12:].tolist()), "truth": tokenizer.piece(int(truth)) if follows else None,
            "truth_energy": energies[-1] if follows else None,
            "candidates": [{"token": tokenizer.piece(int(token)), "probability": float(p), "energy": e}
                           for token, p, e in zip(top.indices, top.values, energies)]}
