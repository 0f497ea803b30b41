"""Evaluations while a model trains: named sets, questions, tasks of the harness, samples; and the
best checkpoint by any of them.
"""

import dataclasses
import json
import signal
import threading

import pytest
import torch
from training_runs import dataset, runs  # noqa: F401  (fixtures)

from ebwm_scale import questions as command
from ebwm_scale.checkpoint.writer import CheckpointWriter
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.config.schema import BestConfig
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.core.faults import Faults
from ebwm_scale.core.world import World
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.data.loading.opening import open_splits
from ebwm_scale.data.tokenizer import open_tokenizer
from ebwm_scale.inference.samples_text import sample_continuations
from ebwm_scale.inference.scoring import ContinuationScore, Scorer
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.training.best_checkpoint import BestCheckpoint, numbers_of, value_at
from ebwm_scale.training.downstream import Downstream, check_downstream, plain_metrics
from ebwm_scale.training.preflight import check_run
from ebwm_scale.training.shared_scoring import SharedScorer
from ebwm_scale.training.validation import validate
from ebwm_scale.world_model import WorldModel

ALONE = World(0, 1, 0, torch.device("cpu"))
SEED = 33


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(multiple choice, cloze, folder of a task of the harness over the same multiple choice)."""
    folder = tmp_path_factory.mktemp("questions")
    choices = [
        {"context": "abc de", "choices": [" fgh", " ij", " abc"], "answer": number % 3}
        for number in range(5)
    ]
    blanks = [{"context": "abc", "answer": " de"}, {"context": "fgh ij", "answer": " ab"}]
    for name, rows in (("choices", choices), ("blanks", blanks)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    task = {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "choices.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "tasks" / "local_choice.yaml").write_text(json.dumps(task))
    return folder / "choices.jsonl", folder / "blanks.jsonl", folder / "tasks"


def evaluation(files, manifest, **more):
    """The section of a configuration that asks for all but tasks of the harness."""
    return {
        "max_samples": 6,
        "sets": [{"name": "other", "manifest": str(manifest)}],
        "questions": [
            {"name": "choices", "kind": "multiple_choice", "file": str(files[0])},
            {"name": "blanks", "kind": "cloze", "file": str(files[1])},
        ],
        "samples": 2,
        "samples_tokens": 4,
        **more,
    }


def configuration(files, manifest, **more):
    return config_from_dict(
        {
            "model": {"size": "4xs", "num_layers": 1, "width": 16, "num_heads": 1},
            "refinement": {"step_size": 30},
            "data": {"manifest": str(manifest)},
            "train": {"global_batch_size": 2, "max_steps": 8},
            "evaluation": evaluation(files, manifest, **more),
        }
    )


def downstream(config, splits, sets):
    """(Downstream of one process, what it warns of)."""
    warned = []
    found = Downstream(
        config,
        ALONE,
        sets,
        splits["validation"],
        batch_size=3,
        heartbeat=lambda: None,
        stop_requested=lambda: False,
        warn=warned.append,
    )
    return found, warned


@pytest.mark.parametrize("kind", ["energy", "baseline"])
def test_a_row_holds_what_the_commands_find(files, dataset, tmp_path, kind):
    pytest.importorskip("lm_eval", reason="the extra `harness` is not installed")
    tasks = {"tasks": ["local_choice"], "tasks_path": str(files[2])}
    config = configuration(files, dataset, **tasks)
    config = config.replace(model=config.model.replace(kind=kind))
    check = check_run(config, world_size=1, run_dir=tmp_path / "run")
    check.refuse()
    config, split = check.config, check.splits["validation"]
    torch.manual_seed(0)
    model = WorldModel(config)
    evaluated, warned = downstream(config, check.splits, check.sets)
    drawn = torch.get_rng_state()
    row = evaluated.evaluate(model, 8, step_size_scale=1.0)
    assert warned == [] and model.training
    assert torch.equal(torch.get_rng_state(), drawn)
    observe = Observation(split.manifest, "cpu")
    expected = validate(model, split, config, ALONE, observe, context_length=16, batch_size=3)
    assert row["sets"] == {"other": expected}
    content = split.manifest.content
    tokenizer = open_tokenizer(content.tokenizer_path, eos_id=content.eos_id)
    scorer = Scorer(model.eval(), tokenizer, ThinkingConfig(seed=SEED))
    choices = command.multiple_choice(scorer, command.read_questions(files[0], "choices"))
    accuracy = choices["accuracy"]["mean"]
    assert row["questions"]["choices"]["accuracy"] == pytest.approx(accuracy)
    assert row["questions"]["choices"]["chance"] == pytest.approx(1 / 3)
    assert ("accuracy_by_energy" in row["questions"]["choices"]) == (kind == "energy")
    blanks = command.cloze(scorer, command.read_questions(files[1], "answer"))
    nats = blanks["nats_per_token"]["mean"]
    assert row["questions"]["blanks"]["nats_per_token"] == pytest.approx(nats, rel=1e-5)
    assert row["tasks"] == {"local_choice": {"acc": pytest.approx(accuracy)}}
    samples = sample_continuations(model, split, seed=SEED, num_samples=2, num_tokens=4)
    assert row["samples"] == [
        {key: sample[key] for key in ("prompt", "continuation", "reference")} for sample in samples
    ]


def test_questions_wait_for_their_interval_and_the_end(files, dataset):
    splits = open_splits([(dataset, 1.0)], ["validation"], verify="sizes")
    every = {"every_steps": 2, "downstream_every_steps": 6}
    evaluated, _ = downstream(configuration(files, dataset, **every), splits, {})
    assert [step for step in range(2, 10, 2) if evaluated.is_due(step)] == [6, 8]
    evaluated, _ = downstream(configuration(files, dataset), splits, {})
    assert evaluated.is_due(2)


def test_a_task_that_fails_is_one_warning_and_no_end(
    files,
    dataset,
    tmp_path,
    monkeypatch,
):
    from ebwm_scale.training import downstream as module

    def fail(*_):
        raise ZeroDivisionError("a task's own code")

    monkeypatch.setattr(module, "run_tasks", fail)
    tasks = {"tasks": ["local_choice"], "tasks_path": str(files[2]), "samples": 0, "questions": []}
    check = check_run(configuration(files, dataset, **tasks), world_size=1, run_dir=tmp_path / "r")
    evaluated, warned = downstream(check.config, check.splits, {})
    model = WorldModel(check.config)
    for step in (1, 2):
        assert evaluated.evaluate(model, step, step_size_scale=1.0) == {}
    assert warned == ["evaluation.tasks failed: ZeroDivisionError: a task's own code"]


class Threads:
    """World's collectives between threads of one process."""

    def __init__(self, size):
        self.size, self.boxes = size, [None] * size
        self.barrier = threading.Barrier(size, timeout=20)

    def rank(self, rank):
        return dataclasses.make_dataclass(
            "FakeWorld",
            ["rank", "size", "is_main"],
            namespace={
                "all_gather_object": lambda _, value: self._gather(rank, value),
                "broadcast_object": lambda _, value: self._gather(rank, value)[0],
            },
        )(rank, self.size, rank == 0)

    def _gather(self, rank, value):
        self.boxes[rank] = value
        self.barrier.wait()
        values = list(self.boxes)
        self.barrier.wait()
        return values


class Lengths:
    """Stands in for a Scorer: a pair's score is its length; remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def score(self, pairs):
        self.asked += pairs
        return [ContinuationScore(float(len(a + b)), True, 1, 1, None) for a, b in pairs]


@pytest.mark.parametrize("size, fails", [(1, False), (3, False), (3, True)])
def test_ranks_share_the_texts_that_rank_0_asks_for(size, fails):
    """Five texts, then none, then one: each is scored once; what rank 0 raises, all raise."""
    threads, scorers, outcomes = Threads(size), [Lengths() for _ in range(size)], {}
    pairs = [("a" * n, "b") for n in range(5)]

    def ask(score):
        first = [found.log_likelihood for found in score(pairs)]
        assert score([]) == []
        if fails:
            raise ValueError("no such document")
        return first, [found.log_likelihood for found in score(pairs[:1])]

    def of_rank(rank):
        shared = SharedScorer(scorers[rank], threads.rank(rank), lambda: None)
        try:
            outcomes[rank] = shared.lead(ask)
        except RuntimeError as error:
            outcomes[rank] = str(error)

    running = [threading.Thread(target=of_rank, args=(rank,)) for rank in range(size)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    expected = "ValueError: no such document" if fails else ([1.0, 2.0, 3.0, 4.0, 5.0], [1.0])
    assert outcomes == dict.fromkeys(range(size), expected)
    asked = sorted(len(a) for scorer in scorers for a, _ in scorer.asked)
    assert asked == ([0, 1, 2, 3, 4] if fails else [0, 0, 1, 2, 3, 4])
    assert all(len(scorer.asked) <= 3 for scorer in scorers) or size == 1


@pytest.mark.parametrize(
    "section, words",
    [
        ({"sets": [{"name": "a/b", "manifest": "m"}]}, "sets[0].name is 'a/b'"),
        ({"sets": [{"name": "a", "manifest": ""}]}, "sets[0].manifest is absent"),
        ({"sets": [{"name": "a", "manifest": "m"}] * 2}, "each name once"),
        ({"questions": [{"name": "q"}]}, "questions[0].file is absent"),
        ({"tasks": ["t"]}, "give both"),
        ({"tasks_path": "folder"}, "give both"),
        ({"tasks_limit": 3}, "without evaluation.tasks"),
        ({"downstream_every_steps": 7, "every_steps": 2}, "must be a multiple"),
    ],
)
def test_what_cannot_be_meant_is_refused(section, words):
    with pytest.raises(ConfigError) as error:
        config_from_dict({"data": {"manifest": "m.json"}, "evaluation": section})
    assert words in str(error.value)


@pytest.mark.parametrize(
    "metric, known",
    [
        ("loss", True),
        ("sets/other/perplexity", True),
        ("questions/choices/accuracy_per_byte", True),
        ("questions/choices/nats_per_token", False),
        ("tasks/local_choice/acc", True),
        ("tasks/other/acc", False),
        ("los", False),
    ],
)
def test_the_best_is_by_a_number_that_there_is(files, metric, known):
    section = evaluation(files, "m.json", tasks=["local_choice"], tasks_path=str(files[2]))
    values = {"evaluation": section, "checkpoint": {"best": {"metric": metric}}}
    if known:
        assert config_from_dict(values).checkpoint.best.metric == metric
        return
    with pytest.raises(ConfigError, match="no number of a validation row") as error:
        config_from_dict(values)
    assert "sets/other/loss" in str(error.value)


def test_a_task_that_the_folder_lacks_is_refused_before_the_start(files):
    pytest.importorskip("lm_eval", reason="the extra `harness` is not installed")
    section = {"tasks": ["local_choice", "other"], "tasks_path": str(files[2])}
    with pytest.raises(ConfigError, match=r"names other: .* has local_choice"):
        check_downstream(config_from_dict({"evaluation": section}))


@pytest.mark.parametrize(
    "mode, values, steps",
    [
        ("min", [3.0, 2.0, 2.0, float("nan"), None, 1.0], [1, 2, 2, 2, 2, 6]),
        ("max", [3.0, 2.0, 3.0, 4.0], [1, 1, 1, 4]),
        ("max", [float("inf"), None, 0.5], [None, None, 3]),
    ],
)
def test_the_best_is_the_first_of_equals_and_finite(mode, values, steps):
    best = BestCheckpoint(BestConfig(metric="tasks/t/acc", mode=mode), ALONE, print)
    found = []
    for step, value in enumerate(values, 1):
        row = {"loss": 1.0} if value is None else {"loss": 1.0, "tasks": {"t": {"acc": value}}}
        best.see(step, row, is_whole=False)
        found.append(best.step)
        again = BestCheckpoint(best.wanted, ALONE, print)
        again.load_state_dict(best.state_dict())
        assert again.step == best.step  # what a resume goes on from
        best = again
    assert found == steps


def test_a_best_by_something_else_is_forgotten_and_a_missing_metric_said_once():
    warned = []
    best = BestCheckpoint(BestConfig(metric="tasks/t/acc", mode="max"), ALONE, warned.append)
    best.load_state_dict({"metric": "loss", "mode": "min", "step": 3, "value": 1.0})
    assert best.step is None
    for step in (1, 2):
        best.see(step, {"loss": 1.0, "tasks": {"t": {"f1": 0.5}}}, is_whole=True)
    (line,) = warned
    assert "loss, tasks/t/f1" in line
    nobody = BestCheckpoint(None, ALONE, warned.append)
    nobody.see(1, {"loss": 1.0}, is_whole=True)
    assert nobody.state_dict() is None and len(warned) == 1


def test_numbers_of_a_nested_row_have_paths():
    row = {"loss": 1.0, "split": "x", "tasks": {"t": {"em/strict": 2, "n": True}}}
    assert numbers_of(row) == ["loss", "tasks/t/em/strict"]
    found = [value_at(row, path) for path in [*numbers_of(row), "tasks/t/n", "tasks/t", "no/loss"]]
    assert found == [1.0, 2.0, None, None, None]
    harness = {
        "alias": "t",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "em,strict": 1,
        "f1,none": "-",
    }
    assert plain_metrics(harness) == {"acc": 0.5, "em/strict": 1.0}


BEST = {"metric": "questions/blanks/nats_per_token", "mode": "max"}


def overrides(files, manifest, **more):
    section = evaluation(files, manifest, every_steps=2)
    values = {f"evaluation.{key}": value for key, value in section.items()}
    return {**values, "checkpoint.best": BEST, "checkpoint.keep_last": 1, **more}


@pytest.fixture(scope="module")
def unbroken(runs, files, dataset):
    runs.run("unbroken", overrides=overrides(files, dataset))
    return runs


def best_of(folder):
    """(the step that `best` names, the events `best`)."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    name = (folder / "checkpoints" / "best").read_text().strip()
    assert (folder / "checkpoints" / name / "manifest.json").exists()
    return int(name.removeprefix("step_")), [e for e in events if e["event"] == "best"]


def test_the_best_checkpoint_is_kept_and_its_place_recorded(unbroken):
    rows = [row for row in unbroken.rows("unbroken") if row.get("split") == "validation"]
    values = {row["step"]: value_at(row, BEST["metric"]) for row in rows}
    assert sorted(values) == [2, 4, 6, 8] and all("samples" in row for row in rows)
    best, events = best_of(unbroken.folder / "unbroken")
    assert values[best] == max(values.values())
    rising = [
        step for step in values if values[step] == max(v for s, v in values.items() if s <= step)
    ]
    assert [event["step"] for event in events] == rising
    assert events[-1]["value"] == values[best]
    assert events[-1]["folder"] == f"checkpoints/step_{best:06d}"


@pytest.mark.parametrize(
    "name, faults",
    [
        ("killed", "kill@step=5"),
        pytest.param("killed_in_evaluation", "kill@evaluation=2", marks=pytest.mark.soak),
    ],
)
def test_evaluations_and_the_best_are_the_same_after_kill_9_and_resume(
    unbroken,
    files,
    dataset,
    name,
    faults,
):
    asked = overrides(files, dataset)
    killed = {"EBWM_FAULTS": faults}
    unbroken.run(name, expect=-signal.SIGKILL, overrides=asked, variables=killed)
    unbroken.run(name, overrides=asked, flags=("--resume",))
    assert unbroken.rows(name) == unbroken.rows("unbroken")
    best = [best_of(unbroken.folder / run)[0] for run in (name, "unbroken")]
    assert best[0] == best[1]


@pytest.mark.parametrize(
    "stage, processes",
    [
        pytest.param(*case, marks=pytest.mark.soak)
        for case in ((3, 2), (1, 2), (2, 2), (0, 4), (3, 4))
    ],
)
@pytest.mark.multiprocess
def test_evaluations_and_the_best_are_the_same_at_every_stage(
    unbroken,
    files,
    dataset,
    stage,
    processes,
):
    name = f"stage_{stage}_{processes}"
    more = {"deepspeed.zero_stage": stage}
    if stage == 3:
        more["refinement.recompute"] = "block"
    unbroken.run(name, overrides=overrides(files, dataset, **more), processes=processes)
    for mine, theirs in zip(unbroken.rows(name), unbroken.rows("unbroken"), strict=True):
        for path in numbers_of(theirs):
            assert value_at(mine, path) == pytest.approx(value_at(theirs, path), rel=1e-5), path
        assert mine.get("samples") == theirs.get("samples")
    assert best_of(unbroken.folder / name)[0] == best_of(unbroken.folder / "unbroken")[0]


def test_a_kill_behind_a_publication_leaves_no_wrong_best(tmp_path):
    """The name is written after the checkpoint: the one that is resumed from says what is best."""
    config = config_from_dict({"checkpoint": {"best": {"metric": "loss"}}})
    writer = CheckpointWriter(tmp_path, ALONE, config, Faults(None, 0), still_ours=lambda: None)
    for step in (2, 4):
        (tmp_path / f"step_{step:06d}").mkdir()
    (tmp_path / "best").write_text("step_000002\n")
    for step, expected in ((None, 2), (2, 2), (4, 4), (6, 4)):  # there is no step 6
        assert writer.restore_best(step) == []
        assert (tmp_path / "best").read_text() == f"step_{expected:06d}\n"
