"""A run on tasks written as text, from shards to the page of what it solves."""

import json

import pytest
from training_runs import Runs

from ebwm_scale import evaluate
from ebwm_scale.data.prepare.reasoning.dataset import make_reasoning_dataset

pytestmark = pytest.mark.multiprocess


def test_a_model_is_trained_on_products_and_evaluated_by_what_it_solves(tmp_path):
    manifest, larger = make_reasoning_dataset(
        "multiplication",
        tmp_path / "data",
        sizes=[1, 2],
        larger=[3],
        num_train=100,
        num_validation=20,
        report=lambda line: None,
    )
    runs = Runs(tmp_path, manifest)
    overrides = {"train.max_steps": 2, "checkpoint.every_steps": 0, "refinement.replay": True}
    output = runs.run("products", overrides=overrides)
    row = next(row for row in runs.rows("products") if row.get("split") == "validation")
    assert f"unigram entropy {row['unigram_entropy']:.4f}" in output
    arguments = ["--max-samples", "20", "--steps", "1", "2"]
    assert evaluate.main([str(tmp_path / "products"), *arguments]) == 0
    result = json.loads((tmp_path / "products" / "solving.json").read_text())
    assert result["num_samples"] == 20 and [p["num_steps"] for p in result["steps"]] == [1, 2]
    folder = tmp_path / "larger"
    arguments += ["--data", str(larger), "--output", str(folder)]
    assert evaluate.main([str(tmp_path / "products"), *arguments]) == 0
    assert json.loads((folder / "solving.json").read_text())["num_targets"] > result["num_targets"]
    assert (folder / "solving.html").exists()
