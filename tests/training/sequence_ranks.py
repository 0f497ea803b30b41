"""A process of several that share each sample: what it finds against one process, in float64.

    RANK=r WORLD_SIZE=n ... python tests/training/sequence_ranks.py [--float32] CASE[:MISTAKE] ..

Every process takes a training step of each case twice: alone, with whole samples, and with its part
of them. Printed is a JSON line per case with the largest differences: of losses and energies, of
the evaluation's, and of every parameter's gradient (averaged over processes, as an engine does),
relative to its largest entry.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from unittest import mock

import torch
import torch.distributed as dist

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import DataError
from ebwm_scale.core.world import World
from ebwm_scale.model.sequence import SequenceGroup, SequencePart, _Exchange
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.training.distributed import init_distributed
from ebwm_scale.world_model import WorldModel

SAMPLES, POSITIONS, VOCABULARY, EOS = 3, 16, 23, 2
PRECISION = [torch.float64]
OTHER_SAMPLES = "other_samples"
ANCHORED = {"predicted_input": "anchored"}
ZEROS = {"initial": "zeros"}
CASES: dict[str, dict] = {
    "stepwise": {"model": {"conditioning": "time_embed"}, "state": {}},
    "full_graph": {"refinement": {"graph": "full", "loss": "last"}},
    "random": {
        "refinement": {
            "graph": "truncate",
            "loss": "last",
            "num_steps": 3,
            "noise": 1.0,
            "step_size_random_factor": 2.0,
        },
    },
    "tiles": {"refinement": {"graph": "full", "tile_rows": 2}, "model": ANCHORED},
    "tiles_by_block": {
        "refinement": {"graph": "full", "tile_rows": 2, "recompute": "block"},
        "model": {"conditioning": "time_embed"},
    },
    "by_step": {"refinement": {"graph": "full", "recompute": "step"}},
    "documents": {
        "data": {"mask_documents": True, "mask_document_starts": True, "eos_id": EOS},
        "refinement": {"graph": "full", "tile_rows": 3},
    },
    "one_target": {
        "data": {"mask_documents": True, "mask_document_starts": True, "eos_id": EOS},
        "refinement": {"graph": "full"},
    },
    "one_target_stepwise": {
        "data": {"mask_documents": True, "mask_document_starts": True, "eos_id": EOS},
    },
    "documents_by_block": {
        "data": {"mask_documents": True, "mask_document_starts": True, "eos_id": EOS},
        "refinement": {"recompute": "block"},
        "model": ANCHORED,
    },
    "heads": {
        "model": {
            "conditioning": "adaln_zero",
            "energy_head": ["linear", "quadratic", "bilinear", "context"],
            "num_heads": 8,
            "num_kv_heads": 4,
            "predicted_layers": 2,
            "qk_norm": True,
            "logit_softcap": 6.0,
            **ANCHORED,
        },
        "train": {"z_loss": 0.01},
        "refinement": {"graph": "full", "update": "mirror"},
    },
    "reencoded": {
        "model": {"energy_head": ["bilinear"], **ANCHORED},
        "state": {"workspace": 6, **ZEROS},
        "refinement": {"graph": "full", "update": "mirror", "reencode": 2},
    },
    "read_twice": {
        "model": {"loops": 2, "predicted_layers": 2, "energy_head": ["direct"], **ANCHORED},
        "data": {"mask_documents": True, "mask_document_starts": True, "eos_id": EOS},
    },
    "candidates": {
        "model": {"energy_head": ["bilinear"]},
        "state": {"map_scale": 3.0, **ZEROS},
        "refinement": {"graph": "full", "update": "mirror", "candidates": 9, "num_steps": 3},
    },
    "exits": {
        "refinement": {
            "graph": "full",
            "update": "mirror",
            "loss_weights": "exits",
            "momentum": 0.5,
            "spectral_penalty": 0.5,
            "level_weight": 0.2,
            "num_steps": 3,
        },
    },
    "accepted": {
        "refinement": {"graph": "full", "accept": "lower", "update": "mirror", "num_steps": 3}
    },
    "baseline": {"model": {"kind": "baseline"}},
    "looped": {
        "model": {"kind": "baseline", "loops": 2, "loop_loss": "every"},
        "data": {"mask_documents": True, "mask_document_starts": True, "eos_id": EOS},
    },
}


def configuration(case: str):
    sections = CASES[case]
    return config_from_dict(
        {
            "model": {
                "num_layers": 3,
                "width": 32,
                "num_heads": 4,
                "vocabulary_size": VOCABULARY,
                **sections.get("model", {}),
            },
            "state": sections.get("state", {}),
            "refinement": {
                "step_size": 5.0,
                "learning_rate_multiplier": 1.0,
                **sections.get("refinement", {}),
            },
            "data": {"context_length": POSITIONS, **sections.get("data", {})},
            "train": {"global_batch_size": SAMPLES, **sections.get("train", {})},
        }
    )


def new_model(config) -> WorldModel:
    """No parameter at its start of zeros or ones, so that all of them matter."""
    torch.manual_seed(0)
    model = WorldModel(config).to(PRECISION[0])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def batch_of(config, *, one_target: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """observed, targets: with a document that ends in each sample, at another place in each."""
    generator = torch.Generator().manual_seed(2)
    shape = (SAMPLES, POSITIONS + 1)
    tokens = torch.randint(EOS + 1, VOCABULARY, shape, generator=generator)
    for sample in range(SAMPLES):
        tokens[sample, 3 + 5 * sample] = EOS
    observed, targets = tokens[:, :-1], tokens[:, 1:].clone()
    if config.data.mask_document_starts:
        targets = targets.masked_fill(observed == EOS, -100)
        targets[:, 3 * POSITIONS // 4 :] = -100  # nothing is scored on the last of four
    if one_target:  # fewer than there are processes
        targets = torch.full_like(targets, -100)
        targets[1, 5] = 4
    return observed, targets


def step(case: str, sequence: SequenceGroup | None) -> dict[str, torch.Tensor]:
    """Losses and energies in training and evaluation, and gradients by name."""
    config = configuration(case)
    model = new_model(config)
    model.sequence = sequence
    observed, targets = batch_of(config, one_target=case.startswith("one_target"))
    found = {}
    for mode in ("training", "evaluation"):
        model.train(mode == "training")
        output = model(
            observed,
            targets,
            sample_ids=torch.arange(7, 7 + SAMPLES),
            source=NoiseSource(3, 4),
            step_size_scale=0.9,
        )
        found[f"{mode} loss"] = output.loss.detach()
        found[f"{mode} losses"] = output.loss_per_step
        if output.energy_per_step is not None:
            found[f"{mode} energies"] = output.energy_per_step
        if output.initial_loss is not None:
            found[f"{mode} start"] = output.initial_loss
        if mode == "training":
            output.loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            found[f"gradient of {name}"] = p.grad
    return found


def differences(case: str, world: World, sequence: SequenceGroup) -> dict:
    """The largest of losses and energies, and of gradients."""
    expected = step(case, None)
    found = step(case, sequence)
    row = {"case": case, "processes": world.size, "values": 0.0, "gradients": 0.0, "worst": ""}
    assert found.keys() == expected.keys()
    for name, value in found.items():
        mean = world.all_reduce(value.clone()) / world.size
        scale = expected[name].abs().max().clamp(min=1e-3)
        difference = float((mean - expected[name]).abs().max() / scale)
        kind = "gradients" if name.startswith("gradient") else "values"
        if difference > row[kind]:
            row |= {kind: difference, "worst": name}
    return row


def say_what_is_refused(world: World, sequence: SequenceGroup) -> None:
    """Each process is given samples of its own: the row of the first holds what all were told."""
    model = new_model(configuration("stepwise"))
    model.sequence = sequence
    observed, targets = batch_of(model.config, one_target=False)
    ids = torch.arange(SAMPLES) + world.rank
    message = "nothing"
    try:
        model(observed, targets, sample_ids=ids, source=NoiseSource(3, 4))
    except DataError as error:
        message = str(error)
    refusals = world.all_gather_object(message)
    if world.is_main:
        print(json.dumps({"case": OTHER_SAMPLES, "refusals": refusals}), flush=True)


def broken(mistake: str):
    """Mistakes that train on without a word.

    position: every process takes its positions for the first ones. factor: losses are means over
    the group's positions, which an engine averages once more. derivative: the exchange passes its
    gradient on as if it had stayed on its process.
    """
    if mistake == "position":
        return mock.patch.object(
            SequencePart,
            "observed_rotary",
            lambda part, whole: whole.slice(0, part.front + part.length),
        )
    if mistake == "factor":
        right = WorldModel._own_part

        def of_the_group(model, whole, sequence):
            given = right(model, whole, sequence)
            return replace(given, num_scored=given.num_scored * sequence.size)

        return mock.patch.object(WorldModel, "_own_part", of_the_group)
    if mistake == "derivative":
        stays = staticmethod(lambda ctx, grad: (grad, None))
        return mock.patch.object(_Exchange, "backward", stays)
    assert mistake == "", mistake
    return contextlib.nullcontext()


def main(arguments: list[str]) -> None:
    if arguments[0] == "--float32":
        PRECISION[0] = torch.float32
        arguments = arguments[1:]
    world = init_distributed()
    sequence = SequenceGroup(dist.group.WORLD, world.rank, world.size)
    for argument in arguments:
        if argument == OTHER_SAMPLES:
            say_what_is_refused(world, sequence)
            continue
        case, _, mistake = argument.partition(":")
        with broken(mistake):
            row = differences(case, world, sequence)
        if world.is_main:
            print(json.dumps(row | {"mistake": mistake}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
