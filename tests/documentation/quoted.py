"""What the tests of quoted figures share: result files as the pages show them."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def rows_of(name):
    lines = (ROOT / "results" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def readme_row(start):
    """The two figures of a row of the README's table."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    _, _, baseline, energy, _, _ = row.split("|")
    return baseline.strip(), energy.strip()


def losses_of(study):
    """Of a study of text: recipe -> the losses of seeds 33, 1 and 2 after the trained step."""
    rows = json.loads((ROOT / "results" / study).read_text())["rows"]
    losses = {}
    for row in rows:
        losses.setdefault(row["recipe"], []).append(row["losses"][row["trained_steps"]]["mean"])
    return losses


def with_its_interval(value: dict, digits: int) -> str:
    return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def after_its_trained_steps(recipe: dict) -> dict:
    (point,) = [p for p in recipe["steps"] if p["num_steps"] == recipe["trained_steps"]]
    return point


def signs(values):
    """Of intervals: +, - or 0 where it is on both sides."""
    return "".join("+" if v["low"] > 0 else "-" if v["high"] < 0 else "0" for v in values)
