"""Log-likelihoods of continuations, questions from files, and the harness: the same numbers as the
refinement loop gives.
"""

import json

import pytest
import torch
from test_think_command import LENGTH, text, video  # noqa: F401  (fixtures)

from ebwm_scale import questions
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import DataError, UserError
from ebwm_scale.data.tokenizer import open_tokenizer
from ebwm_scale.inference.scoring import ContinuationScore, Scorer, windows
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.refinement.loop import refine
from ebwm_scale.refinement.noise import EVALUATION_STEP, NoiseSource
from ebwm_scale.refinement.sampling import TrainingNoise
from ebwm_scale.world_model import WorldModel

SEED = 33


def model_of(manifest, **model):
    torch.manual_seed(0)
    config = config_from_dict(
        {
            "model": {
                "num_layers": 2,
                "width": 32,
                "num_heads": 2,
                "vocabulary_size": 300,
                "predicted_input": "anchored",
                **model,
            },
            "refinement": {"step_size": 30.0},
            "data": {"manifest": str(manifest), "context_length": LENGTH},
            "train": {"seed": SEED},
        }
    )
    return WorldModel(config).double().eval(), open_tokenizer(manifest.parent / "tokenizer.model")


def log_probabilities(model, observed):
    """(S, V) after each of the tokens, by training's own loop."""
    embedded, config = model.embed_observed(torch.tensor([observed])), model.config.refinement
    if model.config.model.kind == "baseline":
        return model.output(model.network(embedded))[0].detach().log_softmax(-1)
    draws = TrainingNoise(
        NoiseSource(SEED, EVALUATION_STEP),
        config,
        torch.tensor([0]),
        (1, len(observed), model.state_size),
        randomize=False,
        kind="random_noise",
        dtype=torch.float64,
    )
    return (
        refine(
            model,
            embedded,
            None,
            config=config,
            landscapes=model.landscapes(config.num_steps),
            noise=draws,
            training=False,
            keep_state=torch.float64,
        )
        .state[0]
        .log_softmax(-1)
    )


@pytest.mark.parametrize("kind", ["energy", "baseline"])
def test_a_continuation_is_as_likely_as_the_refinement_loop_says(text, kind):
    model, tokenizer = model_of(text, kind=kind)
    scorer = Scorer(model, tokenizer, ThinkingConfig(seed=SEED), batch_size=2)
    pairs = [("abc de", " fgh"), ("", "ab"), ("ab", "c"), ("j", " abc def")]
    for (context, continuation), score in zip(pairs, scorer.score(pairs)):
        whole, first = scorer.tokens_of(context, continuation)
        assert len(whole) <= LENGTH + 1 and tokenizer.decode(whole) == context + continuation
        table = log_probabilities(model, whole[:-1])
        expected = sum(float(table[i - 1, whole[i]]) for i in range(first, len(whole)))
        assert (
            score.log_likelihood == pytest.approx(expected, abs=1e-5)
            and score.num_tokens == len(whole) - first
        )
        assert score.is_greedy == all(
            int(table[i - 1].argmax()) == whole[i] for i in range(first, len(whole))
        )
        assert (score.energy is None) == (kind == "baseline")


def test_the_greedy_continuation_is_greedy_and_another_is_not(text):
    model, tokenizer = model_of(text)
    context = tokenizer.encode("abc de")
    best = int(log_probabilities(model, [tokenizer.eos_id, *context])[-1].argmax())
    scorer = Scorer(model, tokenizer, ThinkingConfig(seed=SEED))
    for token, greedy in ((best, True), ((best + 1) % 300, False)):
        scorer.tokens_of = lambda *_: ([tokenizer.eos_id, *context, token], 1 + len(context))
        assert scorer.score([("", "x")])[0].is_greedy == greedy


def test_scores_do_not_depend_on_order_or_batching(text):
    model, tokenizer = model_of(text)
    pairs = [("abc de", " fgh"), ("", "ab " * 20), ("ab", "c"), ("abc " * 20, "def")]
    one = Scorer(model, tokenizer, ThinkingConfig(num_starts=2), batch_size=1).score(pairs)
    many = Scorer(model, tokenizer, ThinkingConfig(num_starts=2), batch_size=8).score(pairs[::-1])[
        ::-1
    ]
    for a, b in zip(one, many):
        assert a.log_likelihood == pytest.approx(
            b.log_likelihood, abs=1e-9
        ) and a.energy == pytest.approx(b.energy, abs=1e-9)


@pytest.mark.parametrize(
    "total, first", [(5, 1), (5, 4), (40, 1), (40, 30), (40, 39), (13, 1), (14, 1), (25, 13)]
)
def test_windows_score_every_token_once_given_as_much_as_fits(total, first):
    tokens, scored = list(range(total)), []
    for window in windows(0, tokens, first, LENGTH):
        assert (
            len(window.tokens) <= LENGTH + 1
            and window.tokens == tokens[window.tokens[0] : window.tokens[-1] + 1]
        )
        assert len(window.tokens) == min(
            window.tokens[-1] + 1, LENGTH + 1
        )  # as much context as there is room for
        scored += window.tokens[-window.scored :]
    assert scored == tokens[first:]


def test_several_starts_keep_the_lowest_energy(text):
    from ebwm_scale.inference.energy_functions import SequenceEnergy
    from ebwm_scale.inference.initial_states import SequenceSampler
    from ebwm_scale.inference.scoring import last_states
    from ebwm_scale.inference.thinking import think as refine_candidates

    model, _ = model_of(text)
    observed, config = (
        torch.randint(300, (2, 7), generator=torch.Generator().manual_seed(1)),
        ThinkingConfig(num_starts=3),
    )
    thoughts = []
    for start in range(3):
        noise = SequenceSampler(model, config.seed, torch.zeros(2, dtype=torch.int64), 7, start)
        thoughts.append(
            refine_candidates(
                model,
                SequenceEnergy(model, model.embed_observed(observed).detach()),
                noise.initial(None),
                config,
                noise=noise,
            )
        )
    best = torch.stack([t.energy for t in thoughts]).argmin(0)
    expected = torch.stack([t.state for t in thoughts]).gather(
        0, best[None, :, :, None].expand(1, -1, -1, 300)
    )[0]
    with torch.no_grad():
        assert (
            torch.equal(last_states(model, observed, config), expected) and len(best.unique()) > 1
        )


class Rigged:
    """A scorer that says what it is told."""

    def __init__(self, scores):
        self.scores = scores

    def score(self, pairs):
        assert len(pairs) == len(self.scores)
        return self.scores


def test_multiple_choice_counts_right_answers_by_likelihood_by_bytes_and_by_energy():
    asked = [
        {"context": "", "choices": ["a", "bbbb"], "answer": 1},
        {"context": "", "choices": ["a", "b", "c", "d"], "answer": 0},
    ]
    scores = [
        ContinuationScore(-2, False, 1, 1, 3.0),
        ContinuationScore(-4, False, 1, 4, 2.0),
        *[ContinuationScore(-i, False, 1, 1, -i) for i in range(4)],
    ]
    result = questions.multiple_choice(Rigged(scores), asked)
    assert {
        name: result[name]["mean"]
        for name in ("accuracy", "accuracy_per_byte", "accuracy_by_energy")
    } == {"accuracy": 0.5, "accuracy_per_byte": 1.0, "accuracy_by_energy": 0.5} and result[
        "chance"
    ] == 0.375


def test_cloze_counts_greedy_answers():
    result = questions.cloze(
        Rigged([ContinuationScore(-2, True, 2, 1, None), ContinuationScore(-3, False, 1, 1, None)]),
        [{"context": "", "answer": "a"}] * 2,
    )
    assert result["accuracy"]["mean"] == 0.5 and result["nats_per_token"]["mean"] == 2.0


@pytest.fixture
def files(tmp_path):
    choice, cloze = tmp_path / "choice.jsonl", tmp_path / "cloze.jsonl"
    choice.write_text(
        "".join(
            json.dumps(
                {
                    "context": "abc",
                    "choices": [" de", " fgh", " ij"],
                    "answer": i % 3,
                    "source": "made up",
                }
            )
            + "\n"
            for i in range(6)
        )
    )
    cloze.write_text(json.dumps({"context": "abc", "answer": " d"}) + "\n\n")
    return choice, cloze


def test_the_command_writes_its_result(text, files, monkeypatch, capsys, tmp_path):
    model, _ = model_of(text)
    monkeypatch.setattr(questions, "load_checkpoint", lambda path, **options: (model, model.config))
    assert (
        questions.main(
            [
                str(tmp_path / "run"),
                "--multiple-choice",
                str(files[0]),
                "--cloze",
                str(files[1]),
                "--num-steps",
                "3",
            ]
        )
        == 0
    )
    result = json.loads((tmp_path / "run" / "questions.json").read_text())
    assert result["multiple_choice"][0]["num_questions"] == 6 and result["multiple_choice"][0][
        "accuracy"
    ]["mean"] == pytest.approx(1 / 3)
    assert (
        result["cloze"][0]["nats_per_token"]["mean"] > 0
        and result["thinking"]["num_steps"] == 3
        and "accuracy by energy" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "line, kind, message",
    [
        ("{", "choices", "line 1: not JSON"),
        ("[]", "choices", 'with a text "context"'),
        ('{"context": "a", "choices": ["b"], "answer": 0}', "choices", "two or more"),
        (
            '{"context": "a", "choices": ["b", "c"], "answer": 2}',
            "choices",
            "index of a choice, 0 to 1",
        ),
        ('{"context": "a", "choices": ["b", ""], "answer": 0}', "choices", "not empty"),
        ('{"context": "a", "answer": ""}', "answer", "not empty"),
        ("", "answer", "holds no question"),
        ("[" * 100_000, "answer", "line 1: JSON nested too deeply"),
        ('{"context": "a\\udcff", "answer": "b"}', "answer", "line 1: context is not UTF-8"),
        ('{"context": "a", "answer": "\\ud800"}', "answer", "line 1: answer is not UTF-8"),
        (
            '{"context": "a", "choices": ["b", "\\udc00"], "answer": 0}',
            "choices",
            "line 1: choice 1 is not UTF-8 at character 0",
        ),
        (
            '{"context": "a", "choices": ' + str(["b" * 50] * 99).replace("'", '"') + "}",
            "choices",
            "index of a choice, 0 to 98",
        ),
    ],
)
def test_a_damaged_file_is_refused_with_its_line(tmp_path, line, kind, message):
    (tmp_path / "q.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=message) as error:
        questions.read_questions(tmp_path / "q.jsonl", kind)
    shown = str(error.value).removeprefix(str(tmp_path))
    assert "\n" not in shown and len(shown) < 250 and shown.encode("utf-8")


def test_a_file_that_is_not_utf8_is_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "q.jsonl").write_bytes(b'{"context": "\xff", "answer": "b"}\n')
    assert questions.main([str(tmp_path), "--cloze", str(tmp_path / "q.jsonl")]) == 2
    said = capsys.readouterr().err
    assert "cannot be read as UTF-8" in said and said.count("\n") == 1


def test_a_line_ends_where_the_file_says_it_ends(tmp_path):
    texts = ["a\u2028b", "c\x85d", "e\x0bf"]
    lines = [json.dumps({"context": t, "answer": "x"}, ensure_ascii=False) for t in texts[:2]]
    lines.append(json.dumps({"context": texts[2], "answer": "x"}))
    (tmp_path / "q.jsonl").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    found = questions.read_questions(tmp_path / "q.jsonl", "answer")
    assert [question["context"] for question in found] == texts


def test_a_model_of_video_is_refused():
    config = config_from_dict(
        {
            "model": {"num_layers": 1, "width": 16, "num_heads": 1},
            "state": {"kind": "embedding", "dimension": 4},
            "data": {"context_length": 4},
        }
    )
    with pytest.raises(UserError, match="model of video"):
        Scorer(WorldModel(config), None)


@pytest.fixture
def harness(text, monkeypatch):
    pytest.importorskip("lm_eval", reason="the extra `harness` is not installed")
    from ebwm_scale import harness as adapter

    model, tokenizer = model_of(text)
    monkeypatch.setattr(adapter, "load_checkpoint", lambda path, device: (model, model.config))
    return adapter, Scorer(model, tokenizer, ThinkingConfig(seed=SEED))


@pytest.mark.multiprocess
def test_the_harness_runs_a_local_task_and_agrees_with_our_own_count(harness, files, tmp_path):
    adapter, scorer = harness
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "local_choice.yaml").write_text(
        json.dumps(
            {
                "task": "local_choice",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(files[0])}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "{{context}}",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "{{answer}}",
                "target_delimiter": "",
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            }
        )
    )
    import lm_eval
    from lm_eval.tasks import TaskManager

    result = lm_eval.simple_evaluate(
        model=adapter.HarnessModel("run"),
        tasks=["local_choice"],
        task_manager=TaskManager(include_path=str(tmp_path / "task"), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    ours = questions.multiple_choice(scorer, questions.read_questions(files[0], "choices"))
    assert result["results"]["local_choice"]["acc,none"] == pytest.approx(ours["accuracy"]["mean"])
    said = [float(answer[0][0]) for answer in result["samples"]["local_choice"][0]["resps"]]
    assert said == pytest.approx(
        [
            score.log_likelihood
            for score in scorer.score([("abc", c) for c in (" de", " fgh", " ij")])
        ],
        abs=1e-6,
    )


def test_the_harness_reads_whole_texts_and_generates_until_a_stop(harness):
    adapter, scorer = harness
    model = adapter.HarnessModel("run", num_steps=2, batch_size="auto")
    request = lambda *arguments: type("Request", (), {"args": arguments})()
    assert model.loglikelihood_rolling([request("abc de " * 9)]) == pytest.approx(
        [scorer.score([("", "abc de " * 9)])[0].log_likelihood]
    )
    (whole,) = model.generate_until([request("abc", {"max_gen_toks": 12})])
    assert len(whole) > 3
    stop = whole[2]
    assert model.generate_until([request("abc", {"max_gen_toks": 12, "until": [stop]})]) == [
        whole[: whole.index(stop)]
    ]


def test_the_harness_refuses_an_unknown_argument(harness):
    with pytest.raises(UserError, match="known are checkpoint"):
        harness[0].HarnessModel("run", thinking_hard=3)
