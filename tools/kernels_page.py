#!/usr/bin/env python3
"""Write kernels/BENCHMARKS.md from the result files of tools/bench_kernels.py, and nothing else.

    python tools/kernels_page.py

One table per file results/bench_kernels_*.json and size. What was not measured has no row.
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "kernels" / "BENCHMARKS.md"
LEVELS = ("forward", "inner_gradient", "backward", "double_backward")
HEADER = """# Benchmarks of ebwm_kernels

Written by `tools/kernels_page.py` from the result files named below; do not edit.
Milliseconds are medians. A level is what `tools/bench_kernels.py` times under that name:
`inner_gradient` is the gradient under `create_graph=True`, `double_backward` its own backward.
`energy` and `causal` are this package; `math` is the energy attention through the MATH backend of
PyTorch's scaled_dot_product_attention. The error is the largest of a level, relative to float64.
"""


def page(files: list[Path]) -> str:
    """The whole page in Markdown."""
    parts = [HEADER]
    for file in files:
        parts += _file_section(file.name, json.loads(file.read_text()))
    return "\n".join(parts)


def result_files() -> list[Path]:
    return sorted((ROOT / "results").glob("bench_kernels_*.json"))


def _file_section(name: str, result: dict) -> list[str]:
    where = [f"{result['device']}", f"{result['dtype']}", f"PyTorch {result['torch']}"]
    if result.get("cuda"):
        where.append(f"CUDA {result['cuda']}, Triton {result['triton']}")
    else:
        where.append(f"{result['threads']} threads")
    parts = [
        f"## results/{name}\n",
        f"{', '.join(where)}; commit {result['commit'][:9]}.\n",
        f"    {result['command']}\n",
    ]
    sizes = {(row["S"], row["d"], row["B"], row["H"]) for row in result["rows"]}
    for size in sorted(sizes):
        rows = [r for r in result["rows"] if (r["S"], r["d"], r["B"], r["H"]) == size]
        S, d, B, H = size
        parts += [f"### S {S}, d {d}, B {B}, H {H}\n", _table(rows)]
    return parts


def _table(rows: list[dict]) -> str:
    lines = [
        "| implementation | level | milliseconds | peak GiB | error |",
        "|---|---|---|---|---|",
    ]
    order = {level: place for place, level in enumerate(LEVELS)}
    for row in sorted(rows, key=lambda r: (r["implementation"], order.get(r["level"], 9))):
        if row.get("milliseconds") is None:
            outcome = "out of memory" if row.get("out_of_memory") else "failed"
            lines.append(f"| {row['implementation']} | {row['level']} | {outcome} | | |")
            continue
        cells = [
            row["implementation"],
            row["level"],
            f"{row['milliseconds']:.2f}",
            _number(row.get("peak_gib"), ".2f"),
            _number(row.get("error"), ".1e"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    PAGE.write_text(page(result_files()))
    print(f"wrote {PAGE.relative_to(ROOT)}")
