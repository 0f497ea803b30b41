"""The tables of docs/performance.md and docs/kernels.md about GPUs say what result files say."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def result(name: str) -> list[dict]:
    return json.loads((ROOT / "results" / f"{name}.json").read_text())["steps"]


def by_form(rows: list[dict]) -> dict[tuple[str, str], dict]:
    return {(row["size"], row.get("form", "default")): row for row in rows}


def test_the_counted_steps_are_those_of_their_files():
    text = (ROOT / "docs/performance.md").read_text()
    after = by_form(result("count_step"))
    before = by_form(result("count_step_before") + result("count_baseline_before"))
    assert len(after) == 6
    for (size, form), row in after.items():
        old = before[size, form]
        name = size if form == "default" else f"{size}, {form}"
        cells = [name, old["total"]["launches"], row["total"]["launches"]]
        cells.append(row["launches_with_graph"] or "")
        for kind in ("pointwise", "products"):
            cells += [f"{one[kind]['gigabytes']:.1f} GB" for one in (old, row)]
        line = "| " + " | ".join(map(str, cells)) + " |"
        assert line in text, line


def test_the_counted_forms_are_those_of_their_files():
    text = (ROOT / "docs/performance.md").read_text()
    before = by_form(result("count_forms_before") + result("count_graph_forms_before"))
    counted = 0
    for key, row in by_form(result("count_forms")).items():
        if key[1] in ("default", "Transformer++"):
            continue
        old = before[key]
        cells = [str(one["total"]["launches"]) for one in (old, row)]
        cells += [f"{one['pointwise']['gigabytes']:.1f} GB" for one in (old, row)]
        assert f"| {' | '.join(cells)} |" in text, (key, cells)
        counted += 1
    assert counted == 9


def test_the_errors_of_whole_steps_are_those_of_their_file():
    text = (ROOT / "docs/kernels.md").read_text()
    rows = result("fused_step_errors")
    assert rows
    for row in rows:
        assert f"{row['gradients']:.1e} beside {row['plain_gradients']:.1e}" in text, row
    single = [row for row in rows if row["precision"] == "float32"]
    least = min(row["least_quotient"] for row in single)
    largest = max(row["largest_quotient"] for row in single)
    assert f"between {least:.1f} and {largest:.1f}" in text, (least, largest)


# What the joint kernels are in place of, beside their own form without the ordinary backward.
APART = {"_second_query": "_gradient_query", "_second_key": "_gradient_key"}


def test_the_page_on_kernels_quotes_the_instructions_of_their_loops():
    text = (ROOT / "docs/kernels.md").read_text()
    parts = json.loads((ROOT / "results/attention_loops.json").read_text())
    before, after = (quoted_loops(parts[part]["programs"]) for part in ("before", "after"))
    assert before.keys() == after.keys() and len(before) == 6
    for kernel, (masked,) in before.items():
        whole, edges = after[kernel]
        assert f"| `{kernel}` | {masked} | {whole} | {edges} |" in text, kernel
        assert whole < masked
    joint = quoted_loops(parts["joint"]["programs"], of_joint=True)
    assert len(joint) == 2
    for kernel, (whole, edges) in joint.items():
        assert f"| `{kernel}` with the ordinary backward |  | {whole} | {edges} |" in text, kernel
        apart = after[kernel][0] + after[APART[kernel]][0]
        assert whole < apart, (kernel, whole, apart)


def quoted_loops(programs: list[dict], of_joint: bool = False) -> dict[str, list[int]]:
    """Kernel -> instructions of its loops; of 9.0 at 64 columns with own keys."""
    found = {}
    for program in programs:
        place = (program["architecture"], program["head_dimension"], program["use"])
        joint = program.get("joint", False)
        if place == ("sm_90", 64, "energy") and program["loops"] and joint == of_joint:
            loops = program["loops"]
            found[program["kernel"]] = [loop["instructions"] for loop in loops]
    return found
