#!/usr/bin/env python3
"""How far a whole training step with fused pointwise operations is from the exact one, beside plain
PyTorch in the same precision: on a CPU, in Triton's interpreter.

    python tools/check_fused_step.py [--form NAME ..] [--precision NAME ..] [--seeds 24]
        [--output FILE.json]

    error    of a step: |g - exact| / |exact|, g the gradient of all parameters, and the loss's
             relative error; the medians over the seeds. exact: the plain step in float64
             from the same rounded weights and the same noise

One seed says little: which rounding a step magnifies, and how much, differs between models. So the
quotients of single ones, of which the least and the largest are written down, lie far apart.

One line per form and precision: both errors, of the fused and of the plain step. Exit status 1
where the fused one is above 1.5 times the plain one's. "autocast" is float32 weights under
torch.autocast in bfloat16. Attention, which has tests of its own, is PyTorch's reference in both.
Step sizes are such that states stay of order one: at the released ones, of tiny random models, the
loss is in the thousands and any rounding decides between tokens.
The interpreter cuts bfloat16 off where a GPU rounds: here it rounds, to the nearest and to even.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from pathlib import Path
from statistics import median
from unittest import mock

import ebwm_scale  # noqa: F401 (before torch is loaded: how its threads wait)

# isort: split
os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are decorated

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from ebwm_scale.config.load import load_config
from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.provenance import provenance
from ebwm_scale.model import attention
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.world_model import WorldModel

FORMS = {
    "default": [],
    "adaln, logits, clamped": [
        "model.conditioning=adaln",
        "refinement.update=logits",
        "refinement.change_clamp=1",
    ],
    "full graph, mirror": ["refinement.graph=full", "refinement.update=mirror"],
    "candidates": ["refinement.candidates=4", "refinement.update=mirror"],
    "Transformer++": ["model.kind=baseline"],
}
PRECISIONS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "autocast": torch.float32,
}
LIMIT = 1.5


class SameNoise(NoiseSource):
    """Drawn in float32, so that every precision has the same numbers."""

    def normal(self, *given, dtype=torch.float32, **options) -> Tensor:
        return super().normal(*given, dtype=torch.float32, **options).to(dtype)


def step(form: str, precision: str, backend: str, seed: int) -> list[Tensor]:
    """Loss and every parameter's gradient, in float64."""
    return gradients(form, PRECISIONS[precision], backend, seed, precision)


def exact_step(form: str, precision: str, seed: int) -> list[Tensor]:
    """The plain step in float64, from weights rounded to the precision."""
    return gradients(form, torch.float64, "reference", seed, precision)


def gradients(
    form: str, dtype: torch.dtype, backend: str, seed: int, precision: str
) -> list[Tensor]:
    model = rounded_model(form, backend, seed, PRECISIONS[precision]).to(dtype)
    tokens = torch.randint(23, (1, 5), generator=torch.Generator().manual_seed(seed))
    autocast: contextlib.AbstractContextManager = contextlib.nullcontext()
    if precision == "autocast" and dtype == torch.float32:
        autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    with plain_attention(), rounding_bfloat16():
        with autocast:
            output = model(
                tokens[:, :-1],
                tokens[:, 1:],
                sample_ids=torch.arange(1),
                source=SameNoise(seed, 0),
            )
        output.loss.backward()
    found = [output.loss, *(p.grad for p in model.parameters() if p.grad is not None)]
    return [u.detach().double() for u in found]


def rounded_model(form: str, backend: str, seed: int, dtype: torch.dtype) -> WorldModel:
    """Of one layer of each stream."""
    config = load_config(
        None,
        [
            "model.num_layers=1",
            "model.width=16",
            "model.num_heads=2",
            "model.vocabulary_size=23",
            "data.context_length=4",
            "refinement.num_steps=2",
            "refinement.step_size=2",
            f"model.attention_backend={backend}",
            *FORMS[form],
        ],
    )
    torch.manual_seed(seed)
    model = WorldModel(config)
    for parameter in model.parameters():  # norms' weights start at 1, adaLN's biases at 0
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(dtype)


@contextlib.contextmanager
def plain_attention():
    """Within it attention is PyTorch's, whatever the backend of the rest."""

    def with_reference(function, *tensors, backend, **options):
        return function(*tensors, **options, backend="reference")

    with contextlib.ExitStack() as stack:
        for name in ("energy_attention", "causal_attention"):
            plain = functools.partial(with_reference, getattr(attention, name))
            stack.enter_context(mock.patch.object(attention, name, plain))
        yield


def rounding_bfloat16():
    """Within it Triton's interpreter rounds to bfloat16 as a GPU does."""
    cut_off = interpreter._convert_float

    def convert(data, source, target, rounding_mode):
        if source != tl.float32 or target != tl.bfloat16:
            return cut_off(data, source, target, rounding_mode)
        rounded = torch.from_numpy(np.array(data, dtype=np.float32)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)

    return mock.patch.object(interpreter, "_convert_float", convert)


def errors(form: str, precision: str, num_seeds: int) -> dict[str, float]:
    """Of loss and gradients, fused and plain: medians over the seeds. And what the gradients' two
    errors of one seed are at least and at most over each other.
    """
    found: dict[str, list[float]] = {}
    for seed in range(num_seeds):
        exact = exact_step(form, precision, seed)
        for name, backend in (("", "triton"), ("plain_", "reference")):
            loss, *gradients = step(form, precision, backend, seed)
            of_loss = relative_error(loss, exact[0])
            of_gradients = relative_error(joined(gradients), joined(exact[1:]))
            found.setdefault(f"{name}loss", []).append(of_loss)
            found.setdefault(f"{name}gradients", []).append(of_gradients)
    quotients = [a / b for a, b in zip(found["gradients"], found["plain_gradients"])]
    medians = {name: median(values) for name, values in found.items()}
    return medians | {"least_quotient": min(quotients), "largest_quotient": max(quotients)}


def joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm().clamp_min(1e-12))


def within_limit(found: dict[str, float], dtype: torch.dtype) -> bool:
    """The loss is one number, whose error may be 0 by chance: it may be a rounding more."""
    loss = found["loss"] <= LIMIT * found["plain_loss"] + torch.finfo(dtype).eps
    return loss and found["gradients"] <= LIMIT * found["plain_gradients"]


@command
def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS))
    precisions = [name for name in PRECISIONS if name != "float64"]
    parser.add_argument("--precision", nargs="+", choices=precisions, default=precisions)
    parser.add_argument("--seeds", type=int, default=24, help="how many models, inputs and noises")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for form in arguments.form:
        for precision in arguments.precision:
            found = errors(form, precision, arguments.seeds)
            multiplied_in = torch.bfloat16 if precision == "autocast" else PRECISIONS[precision]
            right = within_limit(found, multiplied_in)
            rows.append({"form": form, "precision": precision, "right": right, **found})
            print(json.dumps(rows[-1]), flush=True)
    if arguments.output is not None:
        result = provenance("triton") | {"seeds": arguments.seeds, "steps": rows}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return int(not all(row["right"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
