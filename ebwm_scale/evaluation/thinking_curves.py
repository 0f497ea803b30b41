"""What a trained model knows, and what thinking adds: the measures of evaluation.json, each with an
interval (ebwm_scale/evaluate.py says what they are).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebwm_scale.config.schema import Config
from ebwm_scale.core.progress import Progress, no_progress, tracked
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.evaluation.bootstrap import bootstrap_ci, correlation_ci, deciles
from ebwm_scale.evaluation.step_spectrum import step_spectrum
from ebwm_scale.inference.energy_functions import SequenceEnergy
from ebwm_scale.inference.initial_states import SequenceSampler
from ebwm_scale.inference.thinking import ThinkingConfig, Thought, think
from ebwm_scale.refinement.exits import exit_summary


class SequenceBatch(NamedTuple):
    """Whole sequences: sample_ids (B,), observed and targets (B, S, ..), conditions by name."""

    sample_ids: Tensor
    observed: Tensor
    targets: Tensor
    conditions: dict[str, Tensor]


def context_length_of(config: Config) -> int:
    """Of a trained model, which always has one."""
    assert config.data.context_length is not None
    return config.data.context_length


@torch.no_grad()
def evaluate(
    model,
    config: Config,
    split,
    *,
    max_samples: int,
    batch_size: int,
    steps: Sequence[int],
    starts: Sequence[int],
    tolerance: float | None = None,
    texts: dict[str, Tensor] | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """The content of evaluation.json.

    split: a validation split; texts: of another kind, name -> token ids (n, S + 1).
    """
    length = context_length_of(config)
    observe = Observation(split.manifest, next(model.parameters()).device)
    batches = list(_batches(split, observe, length, max_samples, batch_size))
    num_samples = sum(len(batch.sample_ids) for batch in batches)
    result: dict[str, Any] = {
        "modality": split.manifest.modality,
        "kind": config.model.kind,
        "num_samples": num_samples,
        "num_targets": num_samples * length,
    }
    if config.model.kind == "baseline":
        errors = torch.cat([_baseline_errors(model, batch) for batch in batches])
        result["loss"] = _estimate(errors, config)
        return result | _other_texts(model, batches, texts or {}, batch_size, seed=0)
    seed, trained = config.train.seed, config.refinement.num_steps

    def think_all(thinking: ThinkingConfig, what: str) -> tuple[Tensor, Tensor]:
        """(errors, energies), each (samples, S)."""
        pairs = [_think(model, batch, thinking) for batch in tracked(batches, what, progress)]
        errors, energies = zip(*pairs)
        return torch.cat(errors), torch.cat(energies)

    say(f"{num_samples} samples; thinking curves over {', '.join(map(str, steps))} steps")
    result["trained_steps"] = trained
    result["initial"] = _estimate(_initial_errors(model, batches, seed), config)
    curve = []
    errors_as_trained = energies_as_trained = torch.empty(0)
    for n in sorted(set(steps) | {trained}):
        errors, energies = think_all(ThinkingConfig(num_steps=n, seed=seed), f"{n} steps")
        point = {"num_steps": n, **_estimate(errors, config)}
        curve.append(point | {"mean_energy": float(energies.mean())})
        if n == trained:
            errors_as_trained, energies_as_trained = errors, energies
            result["loss"] = curve[-1]
    result["steps"] = curve
    if model.exit_logits is not None:
        result["exits"] = exit_summary(model.exit_logits)
    if 1 in steps and trained > 1:
        first, _ = think_all(ThinkingConfig(num_steps=1, seed=seed), "the first step")
        result["gain_of_later_steps"] = bootstrap_ci((first - errors_as_trained).mean(1))
    accepted = []
    for n in sorted(set(steps)):
        thinking = ThinkingConfig(num_steps=n, seed=seed, accept_only_if_lower=True)
        errors, _ = think_all(thinking, f"{n} steps, each only if lower")
        accepted.append({"num_steps": n, **_estimate(errors, config)})
    result["steps_accept_only_if_lower"] = accepted

    result["energy"] = {
        "rank_correlation_with_error": correlation_ci(energies_as_trained, errors_as_trained),
        "deciles": deciles(energies_as_trained, errors_as_trained),
    }
    if config.state.initial == "random_noise":
        say(f"starts: {', '.join(map(str, starts))}")
        result.update(_starts(model, config, batches, starts, trained, seed, progress))
        fewer = [n for n in sorted(set(steps)) if n < trained]
        result["starts_of_fewer_steps"] = [
            {"num_steps": n} | _starts(model, config, batches, starts, n, seed, progress)
            for n in fewer
        ]
    else:
        result["starts"] = None  # every start is the same: the initial state is not random

    say("dynamic allocation")
    result["allocation"] = _allocation(
        model, config, batches, 4 * trained, tolerance, seed, progress
    )
    say("what a further step does to a small change")
    pairs = [(batch.sample_ids, batch.observed) for batch in batches]
    result["step_spectrum"] = step_spectrum(
        model,
        pairs,
        steps=(trained, 4 * trained),
        seed=seed,
        conditions=[batch.conditions for batch in batches],
    )
    if split.manifest.modality == "text":
        result["out_of_distribution"] = _shuffled(model, batches, seed)
        result |= _other_texts(model, batches, texts or {}, batch_size, seed)
    return result


def _initial_errors(model, batches, seed: int) -> Tensor:
    """(samples, S) loss of the states that thinking starts from."""
    errors = []
    for ids, observed, targets, _ in batches:
        sampler = SequenceSampler(model, seed, ids, observed.shape[1])
        errors.append(_errors(model, sampler.initial(_frames(model, observed)), targets))
    return torch.cat(errors)


def _batches(
    split, observe: Observation, length: int, max_samples: int, batch_size: int
) -> Iterator[SequenceBatch]:
    from ebwm_scale.data.loading.batches import validation_batches

    for batch in validation_batches(
        split,
        context_length=length,
        batch_size=batch_size,
        max_samples=max_samples,
        rank=0,
        world_size=1,
    ):
        observed, targets = observe(batch.sequences)
        conditions = observe.conditions(batch.conditions)
        yield SequenceBatch(batch.sample_ids, observed, targets, conditions)


def _frames(model, observed: Tensor) -> Tensor | None:
    return observed if model.config.state.kind == "embedding" else None


def _errors(model, state: Tensor, targets: Tensor) -> Tensor:
    """(B, S) loss of each position."""
    return model.state_space().loss(state, targets, reduction="none").float().cpu()


def _baseline_errors(model, batch: SequenceBatch) -> Tensor:
    targets = batch.targets
    prediction = model.predict_directly(batch.observed, batch.conditions).float()
    if model.config.state.kind == "embedding":
        return (
            torch.nn.functional.smooth_l1_loss(
                prediction, targets.float(), beta=1.0, reduction="none"
            )
            .mean(-1)
            .cpu()
        )
    return (
        torch.nn.functional.cross_entropy(
            prediction.flatten(0, 1), targets.flatten(), reduction="none"
        )
        .view(targets.shape)
        .cpu()
    )


def _thought(model, batch, config: ThinkingConfig, start: int = 0) -> Thought:
    ids, observed, _, conditions = batch
    noise = SequenceSampler(model, config.seed, ids, observed.shape[1], start)
    embedded = model.embed_observed(observed, conditions)
    return think(
        model,
        SequenceEnergy(model, embedded, model.first_visible(observed)),
        noise.initial(_frames(model, observed)),
        config,
        noise=noise,
    )


def _think(model, batch, config: ThinkingConfig, start: int = 0) -> tuple[Tensor, Tensor]:
    """(errors, energies), each (B, S), of every position after thinking."""
    thought = _thought(model, batch, config, start)
    assert thought.energy is not None  # only a baseline has none
    return _errors(model, thought.state, batch.targets), thought.energy.float().cpu()


def _starts(
    model,
    config: Config,
    batches,
    starts: Sequence[int],
    num_steps: int,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Best of K starts by energy, and the spread of energy over starts against the error.

    below_any: how far the loss of the best is below the mean of the K, paired by sample.
    """
    errors, energies = [], []
    thinking = ThinkingConfig(num_steps=num_steps, seed=seed)
    for k in range(max(starts)):
        tracked_batches = tracked(batches, f"start {k + 1}", progress)
        pairs = [_think(model, batch, thinking, start=k) for batch in tracked_batches]
        errors.append(torch.cat([error for error, _ in pairs]))
        energies.append(torch.cat([energy for _, energy in pairs]))
    errors, energies = torch.stack(errors), torch.stack(energies)  # (K, samples, S)
    rows = []
    for k in sorted(set(starts)):
        best = energies[:k].argmin(0, keepdim=True)
        lowest = errors[:k].gather(0, best)[0]
        row = {"num_starts": k} | _estimate(lowest, config)
        row["mean_energy"] = float(energies[:k].amin(0).mean())
        if k > 1:
            row["below_any"] = bootstrap_ci((errors[:k].mean(0) - lowest).double().mean(1))
        rows.append(row)
    result: dict[str, Any] = {"starts": rows}
    if max(starts) > 1:
        result["uncertainty"] = {
            "rank_correlation_of_energy_spread_with_error": correlation_ci(
                energies.std(0), errors.mean(0)
            )
        }
    return result


def _allocation(
    model,
    config: Config,
    batches,
    num_steps: int,
    tolerance: float | None,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Early stopping: steps used by easy and hard positions, and the loss against that of running
    on.
    """
    rules = ThinkingConfig(num_steps=num_steps, accept_only_if_lower=True, seed=seed, tolerance=0.0)
    on = [_thought(model, batch, rules) for batch in tracked(batches, "running on", progress)]
    if tolerance is None:
        falls = torch.cat([(t.trace[0] - t.trace[1]).flatten() for t in on])
        tolerance = 0.01 * max(float(falls.mean()), 1e-12)
    stopping = dataclasses.replace(rules, tolerance=tolerance)
    stopped = [
        _thought(model, batch, stopping) for batch in tracked(batches, "stopping early", progress)
    ]

    def losses(thoughts: Sequence[Thought]) -> Tensor:
        pairs = zip(thoughts, batches)
        return torch.cat([_errors(model, thought.state, batch.targets) for thought, batch in pairs])

    loss_on, loss_stopped = losses(on), losses(stopped)
    steps = torch.cat([t.steps for t in stopped]).double().cpu()
    return {
        "max_steps": num_steps,
        "tolerance": tolerance,
        "mean_steps": float(steps.mean()),
        "saved": 1 - float(steps.mean()) / num_steps,
        "loss_running_on": _estimate(loss_on, config),
        "loss_stopped": _estimate(loss_stopped, config),
        "rank_correlation_of_steps_with_error": correlation_ci(steps, loss_stopped),
        "deciles_of_error": deciles(loss_stopped, steps),
    }


def _shuffled(model, batches, seed: int) -> dict[str, Any]:
    """Real sequences against the same tokens shuffled."""
    real, shuffled = [], []
    generator = torch.Generator().manual_seed(seed)
    for _, observed, targets, _ in batches:
        real.append(_energies(model, observed, targets))
        tokens = torch.cat([observed, targets[:, -1:]], 1)
        order = torch.stack(
            [torch.randperm(tokens.shape[1], generator=generator) for _ in range(len(tokens))]
        ).to(tokens.device)
        tokens = tokens.gather(1, order)
        shuffled.append(_energies(model, tokens[:, :-1], tokens[:, 1:]))
    real, shuffled = torch.cat(real), torch.cat(shuffled)
    return {
        "mean_energy_real": bootstrap_ci(real),
        "mean_energy_shuffled": bootstrap_ci(shuffled),
        "auroc": _auroc(real, shuffled),
    }


def _other_texts(
    model, batches, texts: dict[str, Tensor], batch_size: int, seed: int
) -> dict[str, Any]:
    """Validation sequences against those of other texts, by energy and by loss."""

    def of(observed: Tensor, targets: Tensor, ids: Tensor) -> dict[str, Tensor]:
        batch = SequenceBatch(ids, observed, targets, {})
        if model.config.model.kind == "baseline":
            return {"loss": _baseline_errors(model, batch).mean(1)}
        return {
            "energy": _energies(model, observed, targets),
            "loss": _think(model, batch, ThinkingConfig(seed=seed))[0].mean(1),
        }

    def together(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    if not texts:
        return {}
    device, rows = batches[0].observed.device, []
    real = together([of(batch.observed, batch.targets, batch.sample_ids) for batch in batches])
    for name, tokens in texts.items():
        ids = torch.arange(len(tokens))
        other = together(
            [
                of(part[:, :-1], part[:, 1:], ids[: len(part)])
                for part in tokens.to(device).split(batch_size)
            ]
        )
        rows.append(
            {"name": name, "num_samples": len(tokens)}
            | {f"mean_{what}": bootstrap_ci(value) for what, value in other.items()}
            | {f"auroc_of_{what}": _auroc(real[what], value) for what, value in other.items()}
        )
    return {"out_of_distribution_texts": rows}


def _energies(model, observed: Tensor, targets: Tensor) -> Tensor:
    """(B,) mean energy of the true next tokens, as certain predictions."""
    certain = model.state_space().weight[targets.clamp(min=0)]
    return (
        SequenceEnergy(model, model.embed_observed(observed), model.first_visible(observed))(
            certain, model.network.num_landscapes - 1
        )
        .mean(1)
        .float()
        .cpu()
    )


def _auroc(real: Tensor, other: Tensor) -> dict[str, float]:
    """Of all pairs, those in which the real sequence has the lower value; equal ones count half."""
    return bootstrap_ci(
        ((real[:, None] < other[None]).double() + 0.5 * (real[:, None] == other[None])).mean(1)
    )


def _estimate(errors: Tensor, config: Config) -> dict[str, Any]:
    """Mean over targets with its interval over samples; text: the perplexity of that mean."""
    result = bootstrap_ci(errors.double().mean(1))
    if config.state.kind == "vocabulary":
        result["perplexity"] = math.exp(min(result["mean"], 700.0))
    return result
