"""Instances that are shown are those that were evaluated, with what was predicted after each number
of steps; pictures and words on the page say the same as the numbers, and the verdict is that of the
intervals.
"""

import copy
import re
from xml.etree import ElementTree

import pytest
import torch

from ebwm_kernels.vocabulary.softmax_cross_entropy import IGNORE
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import DataError
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.data.prepare.reasoning.dataset import make_reasoning_dataset
from ebwm_scale.data.tokenizer import open_tokenizer
from ebwm_scale.evaluation.answers import Instances, answers, numbers_of_steps
from ebwm_scale.evaluation.solving import Other, evaluate_solving
from ebwm_scale.evaluation.solving_examples import choose_instances, numbers_shown
from ebwm_scale.reporting import solving_examples as shown_examples
from ebwm_scale.reporting.solving_page import render
from ebwm_scale.reporting.solving_verdict import judge_solving
from ebwm_scale.training.preflight import fill_from_data
from ebwm_scale.world_model import WorldModel


@pytest.fixture(scope="module")
def manifests(tmp_path_factory):
    """A dataset of a family, by its name."""
    folder = tmp_path_factory.mktemp("tasks")

    def made(family, size):
        (manifest,) = make_reasoning_dataset(
            family,
            folder / family,
            sizes=[size],
            num_train=4,
            num_validation=20,
            report=lambda line: None,
        )
        return manifest

    return {
        "reachability": made("reachability", 3),
        "sudoku": made("sudoku", 4),
        "hops": made("hops", 2),
    }


def model_of(manifest, seed=0, **model):
    torch.manual_seed(seed)
    sizes = {"num_layers": 1, "width": 24, "num_heads": 2, "predicted_input": "anchored"}
    refinement = {"step_size": 3.0, "num_steps": 3}
    config = config_from_dict({"model": {**sizes, **model}, "refinement": refinement})
    config = fill_from_data(config, load_manifest(manifest))
    return WorldModel(config).eval(), config


def run(manifest, model, config, **changes):
    split = open_split(manifest, "validation", verify="sizes")
    options = dict(max_samples=20, batch_size=6, steps=[1, 5])
    return evaluate_solving(model, config, split, **{**options, **changes})


@pytest.fixture(scope="module")
def results(manifests):
    """An energy model against a Transformer++, for each family."""
    found = {}
    for family, manifest in manifests.items():
        other = Other(*model_of(manifest, seed=1, kind="baseline"), "runs/other")
        found[family] = run(manifest, *model_of(manifest), other=other)
    return found


@pytest.mark.parametrize("family", ["reachability", "sudoku", "hops"])
def test_what_is_shown_is_what_the_model_answers_to_the_stored_instance(family, manifests, results):
    manifest = manifests[family]
    split = open_split(manifest, "validation", verify="sizes")
    piece = open_tokenizer(split.manifest.content.tokenizer_path).piece
    model, _ = model_of(manifest)
    instances = results[family]["examples"]["instances"]
    assert 1 <= len(instances) <= 4
    for instance in instances:
        stored = torch.from_numpy(split.read(instance["sample_id"]))[None]
        observed, targets = Observation(split.manifest, "cpu")(stored)
        scored = targets[0] != IGNORE
        right = [piece(token) if s else None for token, s in zip(targets[0].tolist(), scored)]
        assert instance["answer"] == right
        if family == "hops":
            text = "".join(instance["task"])
            assert text.replace("·", " ").startswith(f"{piece(observed[0, 1].item())}")
            assert all(a in (None, t) for a, t in zip(right, instance["task"]))
        else:
            assert instance["task"] == [piece(token) for token in observed[0].tolist()]
        batch = Instances(torch.tensor([instance["sample_id"]]), observed, targets)
        numbers = [entry["num_steps"] for entry in instance["after"]]
        assert numbers == [1, 2, 3, 5]
        for entry, answer in zip(instance["after"], answers(model, batch, numbers)):
            probabilities = answer.logits[0].softmax(-1)
            for place in scored.nonzero().flatten().tolist():
                token = int(probabilities[place].argmax())
                assert entry["predicted"][place] == piece(token)
                assert entry["probability"][place] == pytest.approx(
                    float(probabilities[place, token]), abs=2e-4
                )
            assert [p is None for p in entry["predicted"]] == (~scored).tolist()
            energy = float(answer.energy[0][scored].mean())
            assert entry["energy"] == pytest.approx(energy, rel=1e-4, abs=1e-5)
        assert instance["against"]["energy"] is None


def test_cells_of_mazes_are_shaded_by_being_reached_and_others_by_their_symbol(results):
    assert results["reachability"]["examples"]["mark"] == "+"
    assert results["sudoku"]["examples"]["mark"] is results["hops"]["examples"]["mark"] is None
    for instance in results["reachability"]["examples"]["instances"]:
        for entry in instance["after"]:
            for predicted, chance, of_mark in zip(
                entry["predicted"], entry["probability"], entry["probability_of_mark"]
            ):
                if predicted == "+":
                    assert of_mark == chance
                elif predicted is not None:
                    assert of_mark <= 1 - chance + 1e-3


def test_instances_are_the_first_of_easy_to_hard_ranges():
    groups = [torch.tensor(members) for members in ([0, 0, 1, 1], [1, 0, 0, 0], [0, 1, 0, 0])]
    groups = [members.bool() for members in groups]
    assert choose_instances(groups, 4) == [2, 0, 1]
    assert choose_instances(groups, 2) == [2, 1]
    assert choose_instances(groups, 1) == [2]
    assert choose_instances([torch.ones(5, dtype=torch.bool)], 3) == [0, 1, 2]


def test_each_trained_step_is_looked_at_where_they_are_few():
    def numbers(asked, **sections):
        return numbers_of_steps(config_from_dict(sections), asked)

    assert numbers([2, 9], refinement={"num_steps": 4}) == [1, 2, 3, 4, 9]
    assert numbers([2], refinement={"num_steps": 40}) == [2, 40]
    assert numbers([2, 3], model={"kind": "baseline"}) == [1]
    assert numbers([6], model={"kind": "baseline", "loops": 3}) == [1, 2, 3, 6]
    shown = numbers_shown(range(1, 41), 17)
    assert len(shown) <= 8 and {1, 17, 40} <= set(shown)


def panels_of(page):
    """(lines of the caption, the <svg> element) of every picture of a page."""
    figures = re.findall(
        r'<figure class="state">(<svg.*?</svg>)<figcaption>(.*?)</figcaption>', page, re.S
    )
    return [(caption.split("<br>"), ElementTree.fromstring(svg)) for svg, caption in figures]


@pytest.mark.parametrize("family, cells", [("reachability", 9), ("sudoku", 16)])
def test_pictures_mark_wrong_and_changed_cells_and_say_so_in_words(family, cells, results):
    result = results[family]
    pictures = panels_of(render(result))
    instances = result["examples"]["instances"]
    assert len(pictures) == 7 * len(instances)  # task, four numbers, the other model, the answer
    for index, instance in enumerate(instances):
        mine = pictures[7 * index : 7 * index + 7]
        before = None
        entries = [*instance["after"], instance["against"]]
        for (lines, picture), entry in zip(mine[1:6], entries):
            is_other = entry is instance["against"]
            right = [
                p == a for p, a in zip(entry["predicted"], instance["answer"]) if a is not None
            ]
            kinds = [element.get("class") for element in picture]
            assert kinds.count("wrong") == right.count(False)
            assert f"{sum(right)} of {len(right)} right" in lines
            changed = 0
            if before is not None and not is_other:
                changed = sum(a != b for a, b in zip(before, entry["predicted"]))
                assert f"{changed} changed" in lines
            assert kinds.count("changed") == changed
            assert sum(kind in ("open", "given", "wall") for kind in kinds) == cells
            assert kinds.count("shade") == len(right)
            alt = picture.get("aria-label")
            assert picture.get("role") == "img" and alt.startswith(lines[0])
            assert ("wrong: row" in alt) == (not all(right))
            assert any(line.startswith("energy") for line in lines) == (not is_other)
            before = entry["predicted"]
        assert mine[0][0] == ["the task"] and mine[6][0] == ["the right answer"]
        assert not [e for e in mine[6][1] if e.get("class") in ("wrong", "changed")]


def test_texts_are_tables_of_what_was_answered(results):
    result = results["hops"]
    page = render(result)
    assert not panels_of(page)
    for instance in result["examples"]["instances"]:
        wrong = 0
        for entry in [*instance["after"], instance["against"]]:
            pairs = zip(entry["predicted"], instance["answer"])
            wrong += sum(a is not None and p != a for p, a in pairs)
        title = f"instance {instance['sample_id']}<"
        (article,) = [part for part in page.split("<article")[1:] if title in part]
        assert article.count("✗") == wrong and "after step 5" in article
        assert article.count('class="continuation"') == 4


def test_what_an_instance_holds_is_escaped_and_may_not_be_anything(results):
    result = copy.deepcopy(results["sudoku"])
    result["examples"]["instances"][0]["after"][0]["predicted"][:] = ["<b>"] * 16
    page = render(result)
    assert "<b>" not in page and "&lt;b&gt;" in page
    result["examples"]["instances"][0]["after"][0]["predicted"] = ["x"]
    with pytest.raises(DataError, match="not a result of ebwm evaluate on tasks"):
        render(result)
    result["examples"]["instances"] = "nothing"
    assert "step by step" not in render(result)


def test_a_result_of_before_has_a_page(results):
    result = copy.deepcopy(results["hops"])
    for key in ("examples", "against", "gain_of_later_steps", "settling"):
        del result[key]
    for key in ("gain_over_running_on", "by_difficulty"):
        del result["early_stopping"][key]
    assert "Cannot say" in render(result)


def interval(mean, half=0.01):
    return {"mean": mean, "low": mean - half, "high": mean + half}


def verdict_of(results, **changes):
    result = copy.deepcopy(results["reachability"])
    for path, mean in changes.items():
        place = result
        *keys, last = path.split("__")
        for key in keys:
            place = place[int(key) if key.isdigit() else key]
        place[last] = interval(mean)
    answer, sentence, checks = judge_solving(result)
    return answer, sentence, {check.claim: check.mark for check in checks}


PAIRED = "gain_of_later_steps__"


@pytest.mark.parametrize(
    "loss, solved, answer",
    [(0.1, 0.2, "Yes"), (-0.1, 0.2, "No"), (0.1, 0.0, "Not shown"), (0.1, -0.2, "No")],
)
def test_the_answer_is_that_of_the_intervals(loss, solved, answer, results):
    changes = {PAIRED + "fall_of_loss": loss, PAIRED + "rise_of_solved": solved}
    assert verdict_of(results, **changes)[0] == answer


def test_each_claim_follows_its_interval(results):
    gains = {f"steps__{i}__gain_over_previous__fall_of_loss": 0.1 for i in (1, 2)}
    each = "Each trained step lowers the loss"
    assert verdict_of(results, **gains)[2][each] == "yes"
    half = gains | {"steps__2__gain_over_previous__fall_of_loss": 0.005}
    assert verdict_of(results, **half)[2][each] == "unknown"
    worse = gains | {"steps__2__gain_over_previous__fall_of_loss": -0.1}
    assert verdict_of(results, **worse)[2][each] == "no"
    other = "It solves more than Transformer++"
    for rise, mark in ((0.2, "yes"), (0.0, "unknown"), (-0.2, "no")):
        found = verdict_of(results, against__gain_over_it__rise_of_solved=rise)
        assert found[2][other] == mark
    goes_on = "More steps than were trained do no harm"
    for fall, mark in ((0.2, "yes"), (-0.9, "no")):
        found = verdict_of(results, steps__3__gain_over_trained__fall_of_loss=fall)
        assert found[2][goes_on] == mark
    further = "More steps than were trained solve more"
    for rise, mark in ((0.2, "yes"), (0.0, "unknown"), (-0.2, "no")):
        found = verdict_of(results, steps__3__gain_over_trained__rise_of_solved=rise)
        assert found[2][further] == mark
    harder = "Harder instances get more steps until they settle"
    path = "settling__rank_correlation_of_steps_with_difficulty"
    for correlation, mark in ((0.5, "yes"), (0.0, "unknown"), (-0.5, "no")):
        assert verdict_of(results, **{path: correlation})[2][harder] == mark


def test_the_other_model_is_measured_on_the_same_instances(manifests, results):
    manifest = manifests["sudoku"]
    model, config = model_of(manifest, seed=1, kind="baseline")
    (alone,) = run(manifest, model, config)["steps"]
    against = results["sudoku"]["against"]
    for what in ("loss", "accuracy", "solved"):
        assert against[what] == alone[what]
    (ours,) = [p for p in results["sudoku"]["steps"] if p["num_steps"] == 3]
    fall = alone["loss"]["mean"] - ours["loss"]["mean"]
    assert against["gain_over_it"]["fall_of_loss"]["mean"] == pytest.approx(fall)
    parts = against["gain_over_it"]["by_difficulty"]
    assert sum(part["num_samples"] for part in parts) == 20


def test_pictures_have_a_largest_size(results, monkeypatch):
    monkeypatch.setattr(shown_examples, "MAX_CELLS", 8)
    assert not panels_of(render(results["reachability"]))
