"""The study of rates over widths runs, goes on where it was, takes neighbours of the best rate."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import study_width

from ebwm_scale.data.prepare.text import make_text_dataset
from ebwm_scale.evaluation.width_transfer import read_rows


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    folder, generator = tmp_path_factory.mktemp("text"), random.Random(0)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(6):
        letters = "".join(generator.choice("abcdefgh ") for _ in range(400))
        (corpus / f"{number}.txt").write_text(letters)
    return make_text_dataset(
        [corpus], folder / "shards", tokenizer="bytes", context_length=16, validation_fraction=0.4
    )


@pytest.mark.soak
def test_a_study_goes_on_and_takes_the_neighbours_of_the_best(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(study_width, "RATES", (0.001, 0.01, 0.1))
    monkeypatch.setattr(study_width, "HELD_OUT", 8)
    output = tmp_path / "rows.jsonl"
    small = ["--widths", "32", "64", "--kinds", "baseline", "--steps", "1"]

    def study(*arguments: str) -> list[dict]:
        command = ["study_width.py", str(manifest), "--output", str(output), *small]
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        assert study_width.main() == 0
        return read_rows(output)

    first = study("--rates", "0.01")
    assert [(row["width"], row["parametrization"]) for row in first] == [
        (32, "standard"),
        (64, "standard"),
        (64, "width_scaled"),
    ]
    assert all(4 < row["loss"] < 8 for row in first)
    assert study("--rates", "0.01") == first
    rows = study()
    assert len(rows) == 9 and rows[:3] == first
    again = study("--seeds", "1", "--near-best")[9:]
    best = min((row for row in rows if row["width"] == 32), key=lambda row: row["loss"])["rate"]
    rates = study_width.RATES
    place = rates.index(best)
    tried = [row["rate"] for row in again if row["width"] == 32]
    assert tried == list(rates[max(0, place - 1) : place + 2])
