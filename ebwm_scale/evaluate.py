"""What a trained model knows, and what thinking adds: losses with intervals, thinking curves, and
how far its energies can be trusted.

    ebwm evaluate RUN [--max-samples 256] [--steps 1 2 3 4 8] [--starts 1 2 4]
                      [--out-of-distribution FILE ..] [--output DIR]

Writes evaluation.json and evaluation.html into RUN (or DIR). Losses are means per target over the
validation split (text: nats per token, perplexity is the exponential of the mean; video: SmoothL1),
with 95 % intervals from a bootstrap over samples. For an energy model:

    curves       loss against the number of refinement steps, and against the number of starts of
                 which the lowest energy is kept
    energy       rank correlation of final energy and actual error over positions; mean error in
                 deciles of energy
    allocation   with early stopping: steps used against error, in deciles of it; what the saved
                 steps cost in loss
    uncertainty  rank correlation of the spread of energy over starts with the error
    distribution (text) energies of shuffled tokens against real ones, as AUROC: the share of pairs
                 in which the real text has the lower energy; the same for each file of
                 --out-of-distribution, another language or program code, beside what the loss (of
                 Transformer++ too) would say
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebwm_scale.checkpoint.load import load_checkpoint
from ebwm_scale.config.schema import Config
from ebwm_scale.core.arguments import ArgumentParser, OldOption, command
from ebwm_scale.core.console import progress_on_console, say
from ebwm_scale.core.errors import EXIT_FINISHED, UserError
from ebwm_scale.core.progress import Progress, no_progress, tracked
from ebwm_scale.core.provenance import provenance
from ebwm_scale.data.format.side_files import refuse_another_tokenizer
from ebwm_scale.data.loading.mixture import open_sources
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.evaluation.bootstrap import bootstrap_ci, correlation_ci, deciles
from ebwm_scale.inference.energy_functions import SequenceEnergy
from ebwm_scale.inference.initial_states import SequenceSampler
from ebwm_scale.inference.thinking import ThinkingConfig, Thought, think


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="run folder or checkpoint folder"
    )
    parser.add_argument(
        "--data",
        metavar="MANIFEST",
        help="evaluate on the validation split of this dataset instead of the run's",
    )
    parser.add_argument(
        "--max-samples",
        type=int,
        default=256,
        metavar="N",
        help="validation samples (default %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="samples at a time (default %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=[1, 2, 3, 4, 8],
        metavar="N",
        help="numbers of refinement steps (default 1 2 3 4 8)",
    )
    parser.add_argument(
        "--starts",
        type=int,
        nargs="+",
        default=[1, 2, 4],
        metavar="K",
        help="numbers of starts (default 1 2 4)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=None,
        metavar="E",
        help="of early stopping (default: a hundredth of the mean fall of the first step)",
    )
    parser.add_argument(
        "--out-of-distribution",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="texts (UTF-8) of another kind, to be told from the validation split",
    )
    parser.add_argument(
        "--foreign",
        action=OldOption,
        const="--out-of-distribution",
        dest="out_of_distribution",
        type=Path,
        nargs="+",
    )
    parser.add_argument(
        "--output", type=Path, default=None, metavar="DIR", help="default: the run folder"
    )
    options = parser.parse_args(arguments)
    if min(options.max_samples, options.batch_size, *options.steps, *options.starts) < 1:
        raise UserError("--max-samples, --batch-size, --steps and --starts must be at least 1")
    model, config = load_checkpoint(
        options.checkpoint, device="cuda" if torch.cuda.is_available() else "cpu"
    )
    sources = sources_of(options.data, config)
    split = open_sources(sources, "validation", verify="sizes")
    refuse_another_tokenizer(config, split.manifest)
    texts = out_of_distribution_texts(
        options.out_of_distribution,
        split.manifest,
        context_length_of(config),
        options.max_samples,
    )
    with progress_on_console() as progress:
        result = evaluate(
            model,
            config,
            split,
            max_samples=options.max_samples,
            batch_size=options.batch_size,
            steps=options.steps,
            starts=options.starts,
            tolerance=options.tolerance,
            texts=texts,
            say=say,
            progress=progress,
        )
    about = {
        "checkpoint": str(options.checkpoint),
        "data": [str(manifest) for manifest, _ in sources],
    }
    about |= provenance(arguments=list(arguments) if arguments else None)
    say(str(write_evaluation(options.output or options.checkpoint, about | result)))
    return EXIT_FINISHED


def context_length_of(config: Config) -> int:
    """Of a trained model, which always has one."""
    assert config.data.context_length is not None
    return config.data.context_length


def sources_of(manifest: str | None, config: Config) -> list[tuple[str, float]]:
    """(manifest, weight) of what is evaluated: the one that is named, or what the run was trained
    on.
    """
    if manifest:
        return [(manifest, 1.0)]
    if config.data.sources:
        return [(source.manifest, source.weight) for source in config.data.sources]
    if config.data.manifest is None:
        raise UserError("the run names no dataset: name one with --data")
    return [(config.data.manifest, 1.0)]


def write_evaluation(folder: Path, result: dict[str, Any]) -> Path:
    """evaluation.json and the page beside it, whose path is returned."""
    from ebwm_scale.reporting.evaluation_page import render

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1, allow_nan=False))
    page = folder / "evaluation.html"
    page.write_text(render(result), encoding="utf-8", errors="replace")
    return page


def out_of_distribution_texts(
    paths: Sequence[Path], manifest, length: int, most: int
) -> dict[str, Tensor]:
    """{path: token ids (n, length + 1)}, n at most `most` sequences spread over the file.

    Raises UserError for a file that cannot be read or is too short.
    """
    if paths and manifest.modality != "text":
        raise UserError(
            f"--out-of-distribution takes texts, and this is a model of {manifest.modality}: "
            "leave it out"
        )
    from ebwm_scale.data.tokenizer import Tokenizer

    texts: dict[str, Tensor] = {}
    for path in paths:
        try:
            ids = torch.tensor(
                Tokenizer(manifest.content.tokenizer_path).encode(path.read_text(encoding="utf-8"))
            )
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--out-of-distribution {path}: cannot be read as UTF-8 text: {error}"
            ) from None
        if len(ids) <= length:
            raise UserError(
                f"--out-of-distribution {path}: {len(ids)} tokens, and one sequence of this model "
                f"takes {length + 1}: give a longer text"
            )
        sequences = ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1)
        texts[str(path)] = sequences[
            torch.linspace(0, len(sequences) - 1, min(most, len(sequences))).round().long()
        ]
    return texts


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
    num_samples = sum(len(ids) for ids, _, _ in batches)
    result: dict[str, Any] = {
        "modality": split.manifest.modality,
        "kind": config.model.kind,
        "num_samples": num_samples,
        "num_targets": num_samples * length,
    }
    if config.model.kind == "baseline":
        errors = torch.cat(
            [_baseline_errors(model, observed, targets) for _, observed, targets in batches]
        )
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
        result.update(_starts(model, config, batches, starts, seed, progress))
    else:
        result["starts"] = None  # every start is the same: the initial state is not random

    say("dynamic allocation")
    result["allocation"] = _allocation(
        model, config, batches, 4 * trained, tolerance, seed, progress
    )
    if split.manifest.modality == "text":
        result["out_of_distribution"] = _shuffled(model, batches, seed)
        result |= _other_texts(model, batches, texts or {}, batch_size, seed)
    return result


def _initial_errors(model, batches, seed: int) -> Tensor:
    """(samples, S) loss of the states that thinking starts from."""
    errors = []
    for ids, observed, targets in batches:
        sampler = SequenceSampler(model, seed, ids, observed.shape[1])
        errors.append(_errors(model, sampler.initial(_frames(model, observed)), targets))
    return torch.cat(errors)


def _batches(
    split, observe: Observation, length: int, max_samples: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(sample ids, observed, targets)."""
    from ebwm_scale.data.loading.batches import validation_batches

    for batch in validation_batches(
        split,
        context_length=length,
        batch_size=batch_size,
        max_samples=max_samples,
        rank=0,
        world_size=1,
    ):
        yield batch.sample_ids, *observe(batch.sequences)


def _frames(model, observed: Tensor) -> Tensor | None:
    return observed if model.config.state.kind == "embedding" else None


def _errors(model, state: Tensor, targets: Tensor) -> Tensor:
    """(B, S) loss of each position."""
    return model.state_space().loss(state, targets, reduction="none").float().cpu()


def _baseline_errors(model, observed: Tensor, targets: Tensor) -> Tensor:
    hidden = model.network(model.embed_observed(observed), model.first_visible(observed))
    prediction = model.output(hidden).float()
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
    ids, observed, _ = batch
    noise = SequenceSampler(model, config.seed, ids, observed.shape[1], start)
    return think(
        model,
        SequenceEnergy(model, model.embed_observed(observed), model.first_visible(observed)),
        noise.initial(_frames(model, observed)),
        config,
        noise=noise,
    )


def _think(model, batch, config: ThinkingConfig, start: int = 0) -> tuple[Tensor, Tensor]:
    """(errors, energies), each (B, S), of every position after thinking."""
    thought = _thought(model, batch, config, start)
    assert thought.energy is not None  # only a baseline has none
    return _errors(model, thought.state, batch[2]), thought.energy.float().cpu()


def _starts(
    model, config: Config, batches, starts: Sequence[int], seed: int, progress: Progress
) -> dict[str, Any]:
    """Best of K starts by energy, and the spread of energy over starts against the error."""
    errors, energies = [], []
    for k in range(max(starts)):
        tracked_batches = tracked(batches, f"start {k + 1}", progress)
        pairs = [
            _think(model, batch, ThinkingConfig(seed=seed), start=k) for batch in tracked_batches
        ]
        errors.append(torch.cat([error for error, _ in pairs]))
        energies.append(torch.cat([energy for _, energy in pairs]))
    errors, energies = torch.stack(errors), torch.stack(energies)  # (K, samples, S)
    rows = []
    for k in sorted(set(starts)):
        best = energies[:k].argmin(0, keepdim=True)
        rows.append(
            {"num_starts": k}
            | _estimate(errors[:k].gather(0, best)[0], config)
            | {"mean_energy": float(energies[:k].amin(0).mean())}
        )
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
        return torch.cat([_errors(model, thought.state, batch[2]) for thought, batch in pairs])

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
    for _, observed, targets in batches:
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
        if model.config.model.kind == "baseline":
            return {"loss": _baseline_errors(model, observed, targets).mean(1)}
        return {
            "energy": _energies(model, observed, targets),
            "loss": _think(model, (ids, observed, targets), ThinkingConfig(seed=seed))[0].mean(1),
        }

    def together(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    if not texts:
        return {}
    device, rows = batches[0][1].device, []
    real = together([of(observed, targets, ids) for ids, observed, targets in batches])
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


if __name__ == "__main__":
    sys.exit(main())
