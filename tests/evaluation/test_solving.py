"""Solved shares are those of counting, by difficulty and by number of steps; the page shows them,
and `ebwm evaluate` writes both for runs on tasks.
"""

import itertools
import json

import pytest
import torch

from ebwm_kernels.vocabulary.softmax_cross_entropy import IGNORE
from ebwm_scale import evaluate as evaluation
from ebwm_scale.config.load import config_from_dict, load_config
from ebwm_scale.config.shipped import shipped_folder
from ebwm_scale.core.errors import DataError, UserError
from ebwm_scale.core.world import World
from ebwm_scale.data.format.content import difficulty_of
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.data.prepare.reasoning.dataset import make_reasoning_dataset
from ebwm_scale.evaluation.bootstrap import share_ci
from ebwm_scale.evaluation.solving import Marks, bins_of, evaluate_solving
from ebwm_scale.reporting.solving_page import render, write_solving
from ebwm_scale.training.preflight import fill_from_data
from ebwm_scale.training.validation import validate
from ebwm_scale.world_model import WorldModel

TINY = {
    "model": {"num_layers": 1, "width": 16, "num_heads": 2, "predicted_input": "anchored"},
    "refinement": {"step_size": 3.0, "num_steps": 2},
    "evaluation": {"max_samples": 24},
}


@pytest.fixture(scope="module")
def hops(tmp_path_factory):
    """The manifests of look-ups with one and two hops, and with three."""
    return make_reasoning_dataset(
        "hops",
        tmp_path_factory.mktemp("tasks") / "hops",
        sizes=[1, 2],
        larger=[3],
        num_train=40,
        num_validation=24,
        report=lambda line: None,
    )


def model_of(manifest, **model):
    torch.manual_seed(0)
    config = config_from_dict({**TINY, "model": {**TINY["model"], **model}})
    config = fill_from_data(config, load_manifest(manifest))
    return WorldModel(config).eval(), config


def run(model, config, manifest, **changes):
    split = open_split(manifest, "validation", verify="sizes")
    options = dict(max_samples=24, batch_size=7, steps=[1, 3])
    return evaluate_solving(model, config, split, **{**options, **changes})


def test_marks_are_counted_over_scored_tokens_alone():
    targets = torch.tensor([[IGNORE, 1, 2], [0, IGNORE, IGNORE], [1, 1, IGNORE]])
    likely = torch.tensor([[0, 1, 2], [0, 2, 2], [1, 0, 0]])
    logits = torch.nn.functional.one_hot(likely, 3).double() * 50
    marks = Marks.of(logits, targets)
    assert marks.accuracy.tolist() == [1.0, 1.0, 0.5]
    assert marks.solved.tolist() == [1.0, 1.0, 0.0]
    assert marks.loss.tolist() == pytest.approx([0.0, 0.0, 25.0])


@pytest.mark.parametrize("seed", range(5))
def test_ranges_of_difficulty_hold_every_instance_once(seed):
    generator = torch.Generator().manual_seed(seed)
    difficulty = torch.randint(0, 3 + 4 * seed, (50,), generator=generator)
    bins = bins_of(difficulty)
    assert 1 <= len(bins) <= 6
    assert torch.equal(sum(part.members.long() for part in bins), torch.ones(50).long())
    for part in bins:
        inside = difficulty[part.members]
        assert (int(inside.min()), int(inside.max())) == (part.low, part.high)
    assert all(one.high < other.low for one, other in itertools.pairwise(bins))


def test_a_share_of_none_has_an_interval_that_is_not_empty():
    none, half = share_ci(torch.zeros(50)), share_ci(torch.tensor([0.0, 1.0] * 50))
    assert none["mean"] == none["low"] == 0 and none["high"] == pytest.approx(0.0713, abs=1e-4)
    assert half["low"] == pytest.approx(0.4038, abs=1e-4)  # Wilson's interval of 50 in 100
    assert half["high"] == pytest.approx(0.5962, abs=1e-4)


@pytest.mark.parametrize("kind", ["energy", "baseline", "looped"])
def test_the_loss_is_that_of_validation_and_difficulties_add_up(hops, kind):
    looped = {"kind": "baseline", "loops": 2}
    model, config = model_of(hops[0], **(looped if kind == "looped" else {"kind": kind}))
    split = open_split(hops[0], "validation", verify="sizes")
    row = validate(
        model,
        split,
        config,
        World(0, 1, 0, torch.device("cpu")),
        Observation(split.manifest, "cpu"),
        context_length=split.manifest.context_length,
        batch_size=5,
    )
    result = run(model, config, hops[0])
    trained = 0 if kind == "baseline" else 2
    (point,) = [p for p in result["steps"] if p["num_steps"] == trained]
    # Every instance has four scored answers: a mean over instances is one over answers.
    assert point["loss"]["mean"] == pytest.approx(row["loss"], rel=1e-5)
    assert result["num_targets"] == row["num_tokens"] == 4 * 24
    parts = point["by_difficulty"]
    assert [part["lowest"] for part in parts] == [1, 2]
    mean = sum(part["num_samples"] * part["accuracy"]["mean"] for part in parts) / 24
    assert mean == pytest.approx(point["accuracy"]["mean"])
    assert len(row["loss_per_step"]) == (1 if kind == "baseline" else 2)
    ones = sum(difficulty_of(split.read_fields(i)) == 1 for i in range(24))
    assert parts[0]["num_samples"] == ones
    if kind == "energy":
        assert [p["num_steps"] for p in result["steps"]] == [1, 2, 3]
        assert len(row["energy_per_step"]) == 2
        first, second, third = result["steps"]
        assert "gain_over_previous" not in first and "gain_over_trained" not in second
        for better, worse, gain in (
            (second, first, second["gain_over_previous"]),
            (third, second, third["gain_over_previous"]),
            (third, second, third["gain_over_trained"]),
            (first, second, first["gain_over_trained"]),
        ):
            fall = worse["loss"]["mean"] - better["loss"]["mean"]
            assert gain["fall_of_loss"]["mean"] == pytest.approx(fall, abs=1e-12)
            assert gain["fall_of_loss"]["low"] <= fall <= gain["fall_of_loss"]["high"]
        stopping = result["early_stopping"]
        assert 1 <= stopping["mean_steps"]["mean"] <= stopping["max_steps"] == 8
        assert -1 <= stopping["rank_correlation_of_steps_with_difficulty"]["mean"] <= 1
    else:
        assert "early_stopping" not in result
        assert result["trained_steps"] == (2 if kind == "looped" else None)


def test_a_looped_baseline_is_scored_after_each_number_of_loops(hops):
    model, config = model_of(hops[0], kind="baseline", loops=2)
    result = run(model, config, hops[0], steps=[1, 5])
    assert [point["num_steps"] for point in result["steps"]] == [1, 2, 5]
    assert result["trained_steps"] == 2 and "early_stopping" not in result
    for point in result["steps"]:
        other, _ = model_of(hops[0], kind="baseline", loops=point["num_steps"])
        alone = run(other, other.config, hops[0], steps=[])  # the same weights
        assert alone["steps"][-1]["loss"]["mean"] == pytest.approx(point["loss"]["mean"], rel=1e-6)
    assert "gain_over_trained" in result["steps"][2]
    page = render(result)
    assert "loops" in page and "refinement steps" not in page and "2 (trained)" in page


def test_solved_are_the_instances_that_greedy_generation_answers_right(hops):
    """Of a Transformer++ that was taught a few instances; some it answers, some not."""
    model, config = model_of(hops[0], kind="baseline", width=32)
    split = open_split(hops[0], "validation", verify="sizes")
    stored = torch.stack([torch.from_numpy(split.read(i)) for i in range(10)])
    observed, targets = Observation(split.manifest, "cpu")(stored)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        logits = model.output(model.network(model.embed_observed(observed[:5])))
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets[:5].flatten(), ignore_index=IGNORE
        ).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        solved = Marks.of(
            model.output(model.network(model.embed_observed(observed))), targets
        ).solved
        greedy = []
        for tokens, wanted in zip(observed, targets):
            tokens = tokens.clone()
            right = True
            for place in range(len(tokens)):
                if wanted[place] == IGNORE:
                    continue
                prefix = tokens[None, : place + 1]
                likely = model.output(model.network(model.embed_observed(prefix)))[0, -1].argmax()
                right = right and int(likely) == int(wanted[place])
                if place + 1 < len(tokens):
                    tokens[place + 1] = likely  # what was answered is read on
            greedy.append(float(right))
    assert solved.tolist() == greedy and 0 < sum(greedy) < 10


def test_larger_instances_than_trained_on_are_read_whole(hops):
    model, config = model_of(hops[0])
    result = run(model, config, hops[1], steps=[1])
    assert result["num_targets"] == 4 * 24
    assert {part["lowest"] for part in result["steps"][0]["by_difficulty"]} == {3}


def test_groups_of_another_size_are_refused(hops, tmp_path):
    model, config = model_of(hops[0])
    (grids,) = make_reasoning_dataset(
        "sudoku", tmp_path / "s", sizes=[4], num_train=3, num_validation=3, report=lambda line: None
    )
    with pytest.raises(UserError, match="has groups of 16 tokens, the run was trained on .* of 1"):
        run(model, config, grids)


def test_a_damaged_instance_counts_with_the_difficulty_of_what_replaces_it(hops, tmp_path):
    (manifest,) = make_reasoning_dataset(
        "hops", tmp_path / "h", sizes=[1], num_train=3, num_validation=6, report=lambda line: None
    )
    index = json.loads((manifest.parent / "validation-000000.index.json").read_text())
    path = manifest.parent / "validation-000000.tar"
    content = bytearray(path.read_bytes())
    content[index["fields"]["difficulty.npy"]["offsets"][2] + 128] ^= 8
    path.write_bytes(content)
    model, config = model_of(manifest)
    result = run(model, config, manifest, steps=[1])
    assert result["num_samples"] == 6
    assert [p["lowest"] for p in result["steps"][0]["by_difficulty"]] == [1]


def test_the_page_shows_every_step_and_range_and_escapes_what_it_is_given(hops, tmp_path):
    model, config = model_of(hops[0])
    result = run(model, config, hops[0]) | {"checkpoint": "<script>alert(1)</script>"}
    page = write_solving(tmp_path, result).read_text()
    assert json.loads((tmp_path / "solving.json").read_text())["steps"] == result["steps"]
    assert "<script>" not in page and page.count("<svg") == 6
    for text in (
        "2 (trained)",
        "Solved instances by difficulty",
        "hops, validation: 24 instances",
        "After 8 steps the strongest eigenvalue of a further step is",
    ):
        assert text in page
    baseline = run(*model_of(hops[0], kind="baseline"), hops[0])
    assert "none: no energy model" in render(baseline)
    with pytest.raises(DataError, match="not a result of ebwm evaluate on tasks"):
        render({"steps": []})


def test_the_command_writes_solving_for_tasks_and_takes_a_split(
    hops, tmp_path, monkeypatch, capsys
):
    model, config = model_of(hops[0])
    config = config.replace(data=config.data.replace(manifest=str(hops[0])))
    monkeypatch.setattr(evaluation, "load_checkpoint", lambda *a, **k: (model, config))
    arguments = [str(tmp_path), "--max-samples", "8", "--steps", "1", "--split", "train"]
    assert evaluation.main(arguments) == 0
    assert "solving.html" in capsys.readouterr().out
    result = json.loads((tmp_path / "solving.json").read_text())
    assert result["split"] == "train" and result["num_samples"] == 8
    assert not (tmp_path / "evaluation.json").exists()
    assert evaluation.main([str(tmp_path), "--split", "harder"]) != 0
    assert "has no split 'harder'; it has train, validation" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", sorted(shipped_folder().glob("reasoning/*.yaml")), ids=lambda p: p.stem
)
def test_the_shipped_configurations_fit_their_family(path, tmp_path):
    config = load_config(path)
    family = path.stem.removesuffix("_baseline").replace("_", "-")
    (manifest,) = make_reasoning_dataset(
        family, tmp_path / "d", sizes=[4], num_train=2, num_validation=2, report=lambda line: None
    )
    filled = fill_from_data(config, load_manifest(manifest))
    assert filled.data.scored_share is not None
    assert (config.model.kind == "baseline") == path.stem.endswith("_baseline")
