"""python -m ebwm_scale.evaluate: the same losses as validation, honest intervals, and every part of
the page.
"""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from test_think_command import LENGTH, text, video  # noqa: F401  (fixtures)

from ebwm_scale import evaluate as evaluation
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import DataError, UserError
from ebwm_scale.core.progress import no_progress
from ebwm_scale.core.world import World
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.evaluation import thinking_curves
from ebwm_scale.evaluation.bootstrap import bootstrap_ci, correlation_ci, deciles, ranks
from ebwm_scale.evaluation.thinking_curves import evaluate
from ebwm_scale.reporting.evaluation_page import render
from ebwm_scale.training.validation import validate
from ebwm_scale.world_model import WorldModel


def model_for(manifest, **model):
    torch.manual_seed(0)
    split = open_split(manifest, "validation", verify="sizes")
    is_text = split.manifest.modality == "text"
    config = config_from_dict(
        {
            "model": {
                "num_layers": 2,
                "width": 32,
                "num_heads": 2,
                "predicted_input": "anchored",
                **({"vocabulary_size": 300} if is_text else {}),
                **model,
            },
            "state": {
                "kind": "vocabulary" if is_text else "embedding",
                **({} if is_text else {"dimension": 16}),
            },
            "refinement": {"step_size": 3.0},
            "data": {"context_length": LENGTH if is_text else 4, "manifest": str(manifest)},
            "evaluation": {"max_samples": 12},
        }
    )
    return WorldModel(config).eval(), config, split


def run(model, config, split, **changes):
    return evaluate(
        model,
        config,
        split,
        **{**dict(max_samples=12, batch_size=5, steps=[1, 2, 3], starts=[1, 3]), **changes},
    )


@pytest.mark.parametrize("kind", ["energy", "baseline"])
def test_losses_are_those_of_validation_and_perplexity_is_the_exponential_of_the_mean(text, kind):
    model, config, split = model_for(text, kind=kind)
    row = validate(
        model,
        split,
        config,
        World(0, 1, 0, torch.device("cpu")),
        Observation(split.manifest, "cpu"),
        context_length=LENGTH,
        batch_size=4,
    )
    result = run(model, config, split)
    assert result["loss"]["mean"] == pytest.approx(row["loss"], rel=1e-5) and result["loss"][
        "perplexity"
    ] == pytest.approx(math.exp(row["loss"]), rel=1e-4)
    assert result["loss"]["low"] <= result["loss"]["mean"] <= result["loss"]["high"]
    if kind == "energy":
        assert result["initial"]["mean"] == pytest.approx(row["initial_loss"], rel=1e-5)
        assert {p["num_steps"]: p["mean"] for p in result["steps"]}[2] == pytest.approx(
            row["loss_per_step"][1], rel=1e-5
        )


def test_the_lowest_of_several_starts_is_compared_with_their_mean(monkeypatch):
    """Three starts whose energies order their losses, or order them the wrong way round."""
    errors = torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 3.0]])  # (starts, positions)
    batch = thinking_curves.SequenceBatch(torch.arange(1), *[torch.zeros(1, 2).long()] * 2, {})
    for sign in (1, -1):
        monkeypatch.setattr(
            thinking_curves,
            "_think",
            lambda model, batch, thinking, start, sign=sign: (
                errors[start][None],
                sign * errors[start][None],
            ),
        )
        config = config_from_dict({"model": {"vocabulary_size": 5}})
        found = thinking_curves._starts(None, config, [batch], [1, 2, 3], 2, 0, no_progress)
        gains = [row["below_any"]["mean"] for row in found["starts"][1:]]
        # Means of two starts: 1.5 and 3; of three: 2 and 3. Lowest losses: 1 and 2, highest with
        # two 2 and 4, with three 3 and 4.
        best = {1: [0.75, 1.0], -1: [-0.75, -1.0]}
        assert gains == pytest.approx(best[sign])


def test_every_part_is_there_and_the_page_says_it(text):
    result = run(*model_for(text))
    assert [p["num_steps"] for p in result["steps"]] == [1, 2, 3] and [
        p["num_starts"] for p in result["starts"]
    ] == [1, 3]
    assert result["starts"][1]["mean_energy"] <= result["starts"][0]["mean_energy"]
    first, several = result["starts"]
    assert "below_any" not in first
    assert several["below_any"]["low"] <= several["below_any"]["mean"]
    assert [p["num_steps"] for p in result["starts_of_fewer_steps"]] == [1]
    assert (
        len(result["energy"]["deciles"]) == 10
        and 0 <= result["allocation"]["saved"] < 1
        and 0 <= result["out_of_distribution"]["auroc"]["mean"] <= 1
    )
    page = render(json.loads(json.dumps(result, allow_nan=False)))
    for words in (
        "Loss against refinement steps",
        "lowest energy kept",
        "Error by decile of final energy",
        "Steps used by decile of error",
        "perplexity",
        "rank correlation",
        "shuffled",
        "strongest eigenvalue of a further step",
        "After 1 steps the lowest energy of 3 starts is",
        "After 2 steps the lowest energy of 3 starts is",
    ):
        assert words in page, words
    assert "<script" not in page and "http" not in page.replace("http://www.w3.org", "")


def test_a_learned_exit_is_said(text):
    _, config, split = model_for(text)
    refinement = config.refinement.replace(loss_weights="exits", num_steps=3)
    config = config.replace(refinement=refinement)
    torch.manual_seed(0)
    model = WorldModel(config).eval()
    model.exit_logits.data.copy_(torch.tensor([0.5, -1.0, 1.5]))
    result = run(model, config, split, steps=[1], starts=[1])
    shares = torch.tensor(result["exits"]["probabilities"])
    torch.testing.assert_close(shares, model.exit_logits.softmax(-1).detach())
    expected = result["exits"]["expected_step"]
    assert f"expected after {expected:.2f} steps" in render(json.loads(json.dumps(result)))


def test_the_page_shows_names_as_text_and_refuses_what_is_no_result():
    hostile = "<script>alert(1)</script>\x00\ud800"
    bootstrap_ci = {"mean": 0.5, "low": 0.4, "high": 0.6}
    result = {
        "modality": "text",
        "kind": "baseline",
        "checkpoint": hostile,
        "num_samples": 2,
        "num_targets": 8,
        "loss": bootstrap_ci | {"perplexity": 3.0},
        "out_of_distribution_texts": [
            {
                "name": hostile,
                "num_samples": 2,
                "mean_loss": bootstrap_ci,
                "auroc_of_loss": bootstrap_ci,
            }
        ],
    }
    page = render(result)
    assert "<script" not in page and page.count("&lt;script") == 2 and "perplexity 3" in page
    many = render(
        result | {"out_of_distribution_texts": result["out_of_distribution_texts"] * 10**5}
    )
    assert len(many) < 300_000
    for junk in ({}, result | {"loss": [1]}, result | {"num_samples": "x"}, {"modality": 1}):
        with pytest.raises(DataError, match="not a result of ebwm_scale.evaluate"):
            render(junk)


@pytest.mark.multiprocess
def test_video_and_a_model_that_starts_from_the_last_frame(video):
    path, manifest = video
    model, config, split = model_for(manifest)
    result = run(model, config, split)
    assert (
        "perplexity" not in result["loss"]
        and "out_of_distribution" not in result
        and "SmoothL1" in render(result)
    )


@pytest.mark.parametrize("kind", ["energy", "baseline"])
def test_text_of_another_kind_is_told_apart_where_energy_or_loss_differ(
    text, tmp_path, kind, monkeypatch
):
    """The validation text against itself cannot be told apart and has the validation loss; a text
    of higher energies and losses always can; files of one name stay two.
    """
    model, config, split = model_for(text, kind=kind)
    observe = Observation(split.manifest, "cpu")
    own = torch.cat(
        [
            torch.cat([batch.observed, batch.targets[:, -1:]], 1)
            for batch in thinking_curves._batches(split, observe, LENGTH, 12, 5)
        ]
    )
    kinds = ("loss", "energy") if kind == "energy" else ("loss",)
    result = run(model, config, split, texts={"own": own})
    (row,) = result["out_of_distribution_texts"]
    if (
        kind == "baseline" or config.state.initial == "zeros"
    ):  # a random initial state depends on the sample's number
        assert row["mean_loss"]["mean"] == pytest.approx(result["loss"]["mean"], rel=1e-5)
    assert {key for key in row if key.startswith("auroc")} == {f"auroc_of_{what}" for what in kinds}
    assert row[f"auroc_of_{kinds[-1]}"]["mean"] == pytest.approx(0.5)
    assert "own" in render(json.loads(json.dumps(result)))

    paths = [tmp_path / folder / "code.c" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text("int f(int x) { return x << 2; }\n" * 60)
    texts = evaluation.out_of_distribution_texts(paths, split.manifest, LENGTH, 12)
    assert list(texts) == [str(path) for path in paths] and all(
        tokens.shape[1] == LENGTH + 1 and 1 <= len(tokens) <= 12 for tokens in texts.values()
    )
    if kind == "energy":
        monkeypatch.setattr(
            thinking_curves,
            "_energies",
            lambda model, observed, targets: (targets == targets[:, :1]).all(1).float(),
        )
        constant = run(model, config, split, texts={"constant": torch.full((3, LENGTH + 1), 5)})[
            "out_of_distribution_texts"
        ][0]
        assert constant["auroc_of_energy"]["mean"] == 1


@pytest.mark.multiprocess
def test_a_foreign_text_that_cannot_be_used_is_refused_in_one_line(text, video, tmp_path):
    split, short = open_split(text, "validation", verify="sizes"), tmp_path / "short.txt"
    short.write_text("a")
    for manifest, path, words in (
        (split.manifest, short, "give a longer text"),
        (split.manifest, tmp_path / "absent.txt", "cannot be read"),
        (open_split(video[1], "validation", verify="sizes").manifest, short, "leave it out"),
    ):
        with pytest.raises(UserError, match=words):
            evaluation.out_of_distribution_texts([path], manifest, LENGTH, 12)


def test_results_do_not_depend_on_the_batch_size(text):
    model, config, split = model_for(text)
    few = {"steps": [2], "starts": [1]}
    one = run(model, config, split, batch_size=1, **few)
    many = run(model, config, split, batch_size=12, **few)
    assert one["loss"]["mean"] == pytest.approx(many["loss"]["mean"], rel=1e-6) and one[
        "allocation"
    ]["mean_steps"] == pytest.approx(many["allocation"]["mean_steps"], rel=0.02)


def test_intervals_hold_the_mean_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    inside = [
        (lambda i: i["low"] <= 0 <= i["high"])(bootstrap_ci(torch.randn(60, generator=generator)))
        for _ in range(200)
    ]
    assert 0.88 <= np.mean(inside) <= 0.99


def test_rank_correlation_and_deciles():
    x = torch.randn(20, 15, generator=torch.Generator().manual_seed(0))
    assert correlation_ci(x, x**3)["mean"] == pytest.approx(1) and correlation_ci(x, -x)[
        "mean"
    ] == pytest.approx(-1)
    noise = correlation_ci(x, torch.randn(20, 15, generator=torch.Generator().manual_seed(1)))
    assert noise["low"] < 0 < noise["high"] and correlation_ci(x, torch.zeros(20, 15))["mean"] == 0
    assert ranks(np.array([3.0, 1.0, 3.0])).tolist() == [1.5, 0, 1.5]
    parts = deciles(x, 2 * x)
    assert len(parts) == 10 and all(a["mean"] < b["mean"] for a, b in itertools.pairwise(parts))


def test_the_command_writes_both_files_and_refuses_nonsense_in_one_line(
    text, monkeypatch, capsys, tmp_path
):
    model, config, split = model_for(text)
    monkeypatch.setattr(evaluation, "load_checkpoint", lambda path, **options: (model, config))
    assert (
        evaluation.main(
            [str(tmp_path / "run"), "--max-samples", "6", "--steps", "1", "2", "--starts", "1"]
        )
        == 0
    )
    assert (
        json.loads((tmp_path / "run" / "evaluation.json").read_text())["num_samples"] == 6
        and (tmp_path / "run" / "evaluation.html").exists()
    )
    assert (
        evaluation.main(["run", "--steps", "0"]) == 2
        and "must be at least 1" in capsys.readouterr().err
    )
