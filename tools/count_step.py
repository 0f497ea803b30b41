#!/usr/bin/env python3
"""Launches, bytes and FLOPs of one training step on a GPU, counted on the meta device.

    python tools/count_step.py [--size xxs small medium] [--form default Transformer++ ..]
        [--sequence 1024] [--batch 8] [--vocabulary 50277] [--num-refinement-steps 2]
        [--tile-rows N] [--operations] [--set SECTION.KEY=VALUE ..] [--output FILE.json]

One line per size and form of the model, and with --operations one per operation, the ones that move
most first. Nothing is measured, and no GPU is needed: what is counted, and what is not, stands in
ebwm_scale/planning/step_count.py. "graph": launches where the refinement is replayed as a CUDA
graph.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

from ebwm_scale.core.arguments import ArgumentParser, command

# What is trained, by name: the default recipe, the model it is compared with, and other steps.
FORMS = {
    "default": [],
    "Transformer++": ["model.kind=baseline"],
    "mirror": ["refinement.update=mirror"],
    "logits": ["refinement.update=logits"],
    "clamped": ["refinement.change_clamp=1", "refinement.state_clamp=10"],
    "z-loss": ["train.z_loss=1e-4"],
    "full graph": ["refinement.update=mirror", "refinement.graph=full"],
    "full graph, logits": ["refinement.update=logits", "refinement.graph=full"],
    "full graph, clamped": [
        "refinement.update=mirror",
        "refinement.graph=full",
        "refinement.change_clamp=1",
        "refinement.state_clamp=10",
    ],
    "64 candidates": ["refinement.candidates=64"],
    "64 candidates, clamped": [
        "refinement.candidates=64",
        "refinement.change_clamp=1",
        "refinement.state_clamp=10",
    ],
}


@command
def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--size", nargs="+", default=["xxs", "small", "medium"])
    parser.add_argument(
        "--form", nargs="+", choices=FORMS, default=["default", "Transformer++"], metavar="NAME"
    )
    parser.add_argument("--sequence", type=int, default=1024, help="observed positions per sample")
    parser.add_argument("--batch", type=int, default=8, help="samples per step")
    parser.add_argument("--vocabulary", type=int, default=50277)
    parser.add_argument("--num-refinement-steps", type=int, default=2)
    parser.add_argument("--tile-rows", type=int, default=None, help="refinement.tile_rows")
    parser.add_argument("--operations", action="store_true", help="each operation as well")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="SECTION.KEY=VALUE", help="further configuration"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the counts, as a file")
    arguments = parser.parse_args()

    from ebwm_scale.config.load import load_config
    from ebwm_scale.core.provenance import provenance
    from ebwm_scale.planning.step_count import count_step

    rows = []
    print("size     form           launches  graph  pointwise GB  products GB   TFLOP")
    for size, form in itertools.product(arguments.size, arguments.form):
        config = load_config(None, configuration(arguments, size) + FORMS[form])
        count = count_step(config, arguments.batch)
        graphed = None
        if config.model.kind != "baseline":  # which has no refinement to record
            graphed = launches_with_graph(config, arguments.batch)
        row = row_of(size, count) | {"form": form, "launches_with_graph": graphed}
        rows.append(row)
        total = count.total
        print(
            f"{size:8} {form:14} {total.launches:8} {graphed or '-':>6} "
            f"{count.pointwise.bytes / 1e9:13.1f} {count.products.bytes / 1e9:12.1f} "
            f"{total.flops / 1e12:7.1f}"
        )
        if arguments.operations:
            for name, amount in row["operations"].items():
                print(f"    {name:36} {amount['launches']:7} {amount['gigabytes']:9.2f} GB")
    if arguments.output is not None:
        found = provenance() | {"steps": rows}
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def launches_with_graph(config, batch: int) -> int | None:
    """None where the step is not recorded, which is said."""
    from ebwm_scale.planning.step_count import count_graphed_step

    try:
        return count_graphed_step(config, batch).total.launches
    except ValueError as reason:
        print(reason)
        return None


def configuration(arguments, size: str) -> list[str]:
    """The configuration of a size, as --set would give it."""
    values = [
        f"model.size={size}",
        f"model.vocabulary_size={arguments.vocabulary}",
        "model.attention_backend=triton",
        f"data.context_length={arguments.sequence}",
        f"refinement.num_steps={arguments.num_refinement_steps}",
    ]
    if arguments.tile_rows is not None:
        values.append(f"refinement.tile_rows={arguments.tile_rows}")
    return values + arguments.set


def row_of(size: str, count) -> dict:
    """A size's counts as numbers of a file."""
    operations = {
        name: {
            "launches": amount.launches,
            "gigabytes": round(amount.bytes / 1e9, 3),
            "teraflops": round(amount.flops / 1e12, 3),
        }
        for name, amount in sorted(count.operations.items(), key=lambda item: -item[1].bytes)
    }
    kinds = {"total": count.total, "products": count.products}
    kinds |= {"attention": count.attention, "pointwise": count.pointwise}
    row: dict = {"size": size}
    for name, amount in kinds.items():
        row[name] = {
            "launches": amount.launches,
            "gigabytes": round(amount.bytes / 1e9, 2),
            "teraflops": round(amount.flops / 1e12, 3),
        }
    return row | {"operations": operations}


if __name__ == "__main__":
    sys.exit(main())
