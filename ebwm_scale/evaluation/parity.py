"""Comparison with golden cases: numbers recorded from the authors' released code, replayed through
our model with the same draws.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ebwm_scale.checkpoint import released_ebt as released
from ebwm_scale.config.schema import Config
from ebwm_scale.core.errors import DataError
from ebwm_scale.refinement.loop import StepRecord, refine
from ebwm_scale.training.optimizer import parameter_groups
from ebwm_scale.world_model import WorldModel


class RecordedNoise:
    """The random numbers of a golden case, in the released code's call order: step-size factor,
    number of repeats, Langevin noise.
    """

    def __init__(
        self, noise: Tensor, draws: dict[int, Tensor], kinds: dict[int, str], config: Config
    ):
        self.noise, self.factor = noise, 1.0
        r = config.refinement.step_size_random_factor

        def by_kind(kind: str) -> list[Tensor]:
            return [draws[i] for i in sorted(draws) if kinds.get(i) == kind]

        if by_kind("rand_like"):
            self.factor = 1 / r + by_kind("rand_like")[0] * (r - 1 / r)
        self.repeats = [int(count) for count in by_kind("randint")]
        self.langevin_noise = by_kind("randn_like") if config.refinement.noise else []
        self.scale = config.refinement.noise

    def slice(self, samples: slice, positions: slice) -> RecordedNoise:
        part, cut = copy.copy(self), (samples, positions)
        part.noise, part.langevin_noise = (
            self.noise[cut],
            [noise[cut] for noise in self.langevin_noise],
        )
        part.factor = self.factor[cut] if isinstance(self.factor, Tensor) else self.factor
        return part

    def initial_state(self) -> Tensor:
        return self.noise.clone()

    def starts_at_zero(self) -> bool:
        return False

    def initial_workspace(self) -> Tensor:
        raise ValueError("the released code has no workspace")

    def step_size_factor(self) -> Tensor | float:
        return self.factor

    def langevin(self, step: int) -> Tensor | None:
        return self.scale * self.langevin_noise[step] if self.langevin_noise else None


def check_case(path: str | Path) -> dict[str, float]:
    """Largest relative errors of one case, by what is compared.

    Raises DataError for a file that is not a golden case.
    """
    try:
        with safe_open(str(path), "pt") as file:
            case = json.loads((file.metadata() or {})["case"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(
            f"not a golden case ({type(error).__name__}: {error}); expected a safetensors file "
            "with the metadata entry 'case'"
        ) from None
    hparams = case["hparams"]
    weights = _group(tensors, "state_dict/")
    config = released.config_of(
        hparams, {name: tuple(tensor.shape) for name, tensor in weights.items()}
    )
    model = WorldModel(config).double()
    model.load_state_dict(released.to_ours(weights), strict=True)
    observed, targets = _inputs(tensors, case)

    errors: dict[str, float] = {}
    outcome = _forward(model, config, observed, targets, tensors, case)
    errors["loss"] = relative_error(outcome["loss"], tensors["log/loss"])
    for name, key in (
        ("energies", "energies"),
        ("predictions", "predictions"),
        ("prediction_gradients", "pred_grads"),
    ):
        golden = [
            tensors[f"{key}/{i}"] for i in range(len(outcome[name])) if f"{key}/{i}" in tensors
        ]
        if golden:
            errors[name] = max(
                relative_error(ours.reshape(theirs.shape), theirs)
                for ours, theirs in zip(outcome[name], golden, strict=True)
            )
    _forward(model, config, observed, targets, tensors, case, record=False)["loss"].backward()
    errors["gradients"] = _gradient_error(model, _group(tensors, "grads/"))
    if "grad_norm" in tensors:
        norm = torch.linalg.vector_norm(
            torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
        )
        errors["gradient_norm"] = relative_error(norm, tensors["grad_norm"])
    if any(name.startswith("train/loss/") for name in tensors):
        errors.update(_trajectory_errors(config, weights, observed, targets, tensors, case))
    return errors


def relative_error(ours: Tensor, golden: Tensor) -> float:
    """Largest difference over the largest golden magnitude.

    NaN where shapes or finiteness differ.
    """
    if ours.shape != golden.shape:
        return float("nan")
    difference, scale = (ours.detach() - golden).abs().max().item(), golden.abs().max().item()
    return difference / scale if scale else difference


def _forward(
    model: WorldModel,
    config: Config,
    observed: Tensor,
    targets: Tensor,
    tensors: dict,
    case: dict,
    *,
    record: bool = True,
    noise: Tensor | None = None,
) -> dict:
    """Loss, and per step energies, predictions and their gradients.

    record False: the loss alone, the way training computes it.
    """
    if config.model.kind == "baseline":
        hidden = model.network(model.embed_observed(observed))
        return {
            "loss": model._baseline_loss(hidden, observed, targets),
            "energies": [],
            "prediction_gradients": [],
            "predictions": [_baseline_prediction(model, hidden, tensors)],
        }
    kinds = {int(name.split("/")[1]): kind for name, kind in case.get("scalars", {}).items()}
    recorded = {
        int(name.split("/")[1]): tensor
        for name, tensor in tensors.items()
        if re.fullmatch(r"rand/\d+/1", name)
    }
    draws = RecordedNoise(tensors["noise"] if noise is None else noise, recorded, kinds, config)
    landscapes = [step for step, count in enumerate(draws.repeats) for _ in range(count)] or list(
        range(case["hparams"]["mcmc_num_steps"])
    )
    records: list[StepRecord] = []
    result = refine(
        model,
        model.embed_observed(observed),
        targets,
        config=config.refinement,
        landscapes=landscapes,
        noise=draws,
        training=True,
        record=records.append if record else None,
    )
    return {
        "loss": result.loss,
        "energies": [r.energy for r in records],
        "predictions": [r.state for r in records],
        "prediction_gradients": [
            model.state_space().embedding_vjp(r.gradient).detach() for r in records
        ],
    }


def _baseline_prediction(model: WorldModel, hidden: Tensor, tensors: dict) -> Tensor:
    """The released baseline records log-probabilities or logits; both are compared as what they
    are.
    """
    prediction = model.output(hidden).detach()
    golden = tensors.get("predictions/0")
    if (
        model.config.state.kind == "vocabulary"
        and golden is not None
        and torch.allclose(golden.logsumexp(-1), golden.new_zeros(()), atol=1e-6)
    ):
        return prediction.log_softmax(-1)
    return prediction


def _inputs(tensors: dict, case: dict) -> tuple[Tensor, Tensor]:
    if "inputs/input_ids" in tensors:
        ids = tensors["inputs/input_ids"]
        targets = ids[:, 1:]
        return ids[:, :-1], targets.masked_fill(targets == case["pad_id"], -100)
    embeddings = tensors["inputs/embeddings"]
    return embeddings[:, :-1], embeddings[:, 1:]


def _gradient_error(model: WorldModel, golden: dict[str, Tensor]) -> float:
    """Relative to each golden gradient; where that is zero, to the largest gradient of all, so that
    noise around zero passes.
    """
    ours = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    expected = released.to_ours(golden)
    largest = max(tensor.abs().max().item() for tensor in expected.values())
    if set(ours) != set(expected):
        raise DataError(f"gradients of {sorted(set(ours) ^ set(expected))} exist on one side only")
    errors = []
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        errors.append(
            (ours[name] - gradient).abs().max().item()
            / (scale if scale > 1e-13 * largest else largest)
        )
    return max(errors)


def _trajectory_errors(
    config: Config, weights: dict, observed: Tensor, targets: Tensor, tensors: dict, case: dict
) -> dict[str, float]:
    """Repeat the case's AdamW steps: loss, gradient norm and alpha of each, and the weights after
    the last.
    """
    model = WorldModel(config).double()
    model.load_state_dict(released.to_ours(weights), strict=True)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config),
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.epsilon,
    )
    for group in optimizer.param_groups:
        group["lr"] = config.optimizer.learning_rate * group["rate_scale"]
    errors = {"train_loss": 0.0, "train_gradient_norm": 0.0, "train_weights": 0.0}
    step = 0
    while f"train/loss/{step}" in tensors:
        optimizer.zero_grad()
        loss = _forward(
            model,
            config,
            observed,
            targets,
            tensors,
            case,
            record=False,
            noise=tensors.get(f"train/noise/{step}"),
        )["loss"]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            model.parameters(), config.optimizer.gradient_clipping
        )
        optimizer.step()
        errors["train_loss"] = max(
            errors["train_loss"], relative_error(loss, tensors[f"train/loss/{step}"])
        )
        errors["train_gradient_norm"] = max(
            errors["train_gradient_norm"], relative_error(norm, tensors[f"train/grad_norm/{step}"])
        )
        step += 1
    after = released.to_ours(_group(tensors, "train/state_dict_after/"))
    state = model.state_dict()
    errors["train_weights"] = max(
        relative_error(state[name], tensor) for name, tensor in after.items()
    )
    return errors


def _group(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
