"""The explorer's pages say what thinking computes, show hostile prompts as text, and load nothing;
the command writes one or serves it.
"""

import re
import time
from html.parser import HTMLParser

import pytest
import torch

from ebwm_kernels.vocabulary.softmax_cross_entropy import IGNORE
from ebwm_scale import __main__ as dispatcher
from ebwm_scale import explore
from ebwm_scale.config.load import load_config
from ebwm_scale.config.shipped import shipped_folder
from ebwm_scale.core.errors import DataError, UserError
from ebwm_scale.data.format.manifest import load_manifest
from ebwm_scale.data.tokenizer import open_tokenizer
from ebwm_scale.evaluation.answers import answers
from ebwm_scale.evaluation.solving_examples import some_of
from ebwm_scale.exploring.page import script
from ebwm_scale.exploring.request import FIELDS, TextRequest, read_request
from ebwm_scale.inference.generation import Session
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.reporting.line_chart import Curve, line_chart
from ebwm_scale.reporting.numbers import show
from ebwm_scale.world_model import WorldModel


class Page(HTMLParser):
    """What a browser would make of a page: elements with their attributes, and texts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def rows_of(page, position):
    """[(chances, widths)] of the candidates of a position, of the first model."""
    start = page.index(f'<section data-position="{position}"')
    part = page[start : page.index("</table>", start)]
    return [chances.split("|") for chances in re.findall(r'data-chances="([^"]*)"', part)]


def test_numbers_on_the_page_are_those_of_thinking(opened, runs):
    page = opened("text", "--num-steps", "4").page({"prompt": "abc d", "max_new": "3"})
    model, config = runs["text"]
    session = Session(model, [torch.tensor(list(b"abc d"))], ThinkingConfig(4))
    tokenizer = open_tokenizer("bytes")
    for place in range(5, 8):
        prediction = session.predict()
        probabilities = prediction.state[0].softmax(-1)
        start = page.index(f'<section data-position="{place}"')
        part = page[start : page.index("</section>", start)]
        row = rows_of(page, place)[0]
        assert len(row) == 6  # before the first step, after each of four, after one more
        assert float(row[4].replace(",", "")) == pytest.approx(float(probabilities.max()), rel=2e-3)
        energies = re.search(r'data-energies="([^"]*)"', part).group(1).split("|")
        told = [*prediction.thought.trace[:4, 0, 0].tolist(), float(prediction.energy)]
        numbers = [float(energy.replace("−", "-")) for energy in energies[:5]]
        assert numbers == pytest.approx(told, rel=2e-3, abs=1e-4)
        token = prediction.state[0].argmax()
        assert f"chosen was “{tokenizer.piece(int(token))}”" in part.replace("&#34;", '"').replace(
            "&lt;", "<"
        ).replace("&gt;", ">").replace("&#39;", "'").replace("&amp;", "&")
        session.accept(token[None])


def test_another_prompt_and_other_controls_change_the_numbers(opened):
    explorer = opened("text")
    first = explorer.page({"prompt": "abc", "max_new": "1"})
    last = [rows_of(explorer.page(given), 3) for given in (
        {"prompt": "bbc", "max_new": "1"},
        {"prompt": "abc", "max_new": "1", "step_size": "0.5"},
        {"prompt": "abc", "max_new": "1", "num_steps": "7"},
        {"prompt": "abc", "max_new": "1", "noise": "2"},
        {"prompt": "abc", "max_new": "1", "seed": "8"},
        {"prompt": "abc", "max_new": "1", "num_starts": "5"},
    )]  # fmt: skip
    assert all(rows != rows_of(first, 3) for rows in last)
    assert rows_of(explorer.page({"prompt": "abc", "max_new": "1"}), 3) == rows_of(first, 3)


HOSTILE = [
    "<script>alert(1)</script>",
    "</textarea><img src=x onerror=alert(1)>",
    '"><b>&amp;{{ 7 * 7 }}|0.5|',
    "a\x00b\x1b[31m\x85\u202e\ufeff",
    "\n\n  leading",
    "x" * 20_000,
    "日本 \U0001f600 e\u0301",
    "",
]


@pytest.mark.parametrize("prompt", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_prompts_are_text(opened, prompt):
    page = opened("text", "--against", "plain").page({"prompt": prompt, "max_new": "2"})
    parsed = Page(page)
    assert parsed.of("script") == [{}]
    assert parsed.of("img") == [] and len(parsed.of("textarea")) == 1
    assert not any(name.startswith("on") for _, each in parsed.elements for name in each)
    assert "49" not in page[: page.index("</form>")].replace("seed", "") or "7 * 7" in prompt
    if "alert" in prompt:
        assert "alert(1)" in "".join(parsed.texts) and "<script>alert" not in page
    shown = page[page.index("<textarea") :].partition(">")[2].partition("</textarea>")[0]
    assert shown.startswith("\n")  # the one that HTML leaves out
    if len(prompt) > 16:
        cut = f"The prompt of {len(prompt.encode()):,} tokens is cut to its last 16, the context."
        assert cut in page
    assert len(page) < 1_500_000


def test_pages_load_nothing_and_run_one_script(opened):
    for name in ("text", "mazes", "world", "video"):
        page = opened(name).page(None, served=False)
        for tag, attributes in Page(page).elements:
            for key in ("src", "href", "action", "data", "srcset"):
                value = attributes.get(key, "")
                is_inside = value.startswith(("#", "data:image/"))
                assert value == "" or is_inside, (tag, key, value)
        assert "url(" not in page.replace("url(#", "") and "@import" not in page
        assert page.count("<script>") == 1 and script() in page
        assert Page(page).of("form") == []
        policies = [each.get("content", "") for each in Page(page).of("meta")]
        assert any(said.startswith("default-src 'none'; ") for said in policies)


def test_two_runs_are_given_the_same_tokens(opened, runs):
    page = opened("text", "--against", "plain").page({"prompt": "abc", "max_new": "2"})
    assert page.count("energy model</span>") == page.count("Transformer++</span>") == 4
    alone = opened("text").page({"prompt": "abc", "max_new": "2"})
    assert rows_of(page, 4) == rows_of(alone, 4)
    model, _ = runs["plain"]
    chances = Session(model, [torch.tensor(list(b"abc"))]).predict().state[0].softmax(-1)
    start = page.index('<section data-position="3"')
    theirs = page[page.index("Transformer++</span>", start) : page.index("</section>", start)]
    first = re.search(r'data-chances="([^"]*)"', theirs).group(1)
    assert first == show(float(chances.max()))
    both = opened("text", "--against", "second").page({"prompt": "abc", "max_new": "2"})
    assert both.count("energy model</span>") == 8


@pytest.mark.parametrize(
    "given, said",
    [
        ({"max_new": "33"}, "new tokens is '33': give a whole number from 0 to 32"),
        ({"num_starts": ""}, "starts is '': give a whole number from 1 to 8"),
        ({"num_steps": "1.5"}, "steps is '1.5': give a whole number from 1 to 32, or empty"),
        ({"noise": "nan"}, "Langevin noise is 'nan'"),
        ({"temperature": "-1"}, "temperature is '-1'"),
        ({"top_p": "<b>"}, "is '<b>'"),
        ({"seed": "9" * 99}, "seed is '999"),
        ({"prompt": "x" * 100_001}, "the prompt has 100,001 characters"),
        ({"prompt": "a\udc80"}, "is not UTF-8"),
    ],
)
def test_fields_that_cannot_be_are_named(given, said):
    with pytest.raises(UserError) as caught:
        read_request(given, TextRequest())
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_form_is_read_as_it_was_written():
    request = TextRequest("a\nb", 3, 2, 5, 2, 0.25, 0.5, 0.01, 0.2, 0.3, 0.7, 9, 0.9, 4)
    fields = request.texts()
    assert len(fields) == len(FIELDS)
    assert read_request({**fields, "prompt": "a\r\nb"}, TextRequest()) == request
    ticked = read_request({"accept_only_if_lower": "on"}, request)
    assert ticked.accept_only_if_lower and ticked.thinking.accept_only_if_lower
    assert ticked.thinking.tolerance == 0.01 and ticked.sampling.top_k == 9


def test_a_task_is_shown_as_the_model_answers_it(opened, runs):
    explorer = opened("mazes", "--against", "plain_mazes", "--instances", "6")
    page = explorer.page({"instance": "2", "most_steps": "6"})
    model, _ = runs["mazes"]
    batch = some_of(explorer.explorer.batches, range(6))
    scored = batch.targets != IGNORE
    for answer in answers(model, batch, [1, 2, 3, 4, 6]):
        right = (answer.logits.argmax(-1) == batch.targets) & scored
        accuracy = float((right.sum(1) / scored.sum(1)).mean())
        solved = float((right == scored).all(1).double().mean())
        cells = f'<td class="value">{solved:.4g}</td><td class="value">{accuracy:.4g}</td>'
        assert f'<td class="value">{answer.num_steps}</td>{cells}' in page
        energy = float(answer.energy[1][scored[1]].double().mean())
        assert f"energy {show(energy)}" in page
        assert f"{int(right[1].sum())} of {int(scored[1].sum())} right" in page
    assert "Transformer++" in page and "the right answer" in page
    assert explorer.page({"instance": "1", "go": "1", "most_steps": "6"}) == page
    with pytest.raises(UserError, match="instance is '7': give a whole number from 1 to 6"):
        explorer.page({"instance": "7"})


def test_a_transformer_on_tasks_has_one_answer(opened):
    page = opened("plain_mazes").page()
    assert "its answer" in page and "the right answer" in page


def test_charts_say_in_words_what_they_draw_and_leave_out_what_is_not_finite():
    curves = [Curve("a", [0, 1, 2], [1.0, float("nan"), 3.0]), Curve("b", [0], [float("inf")])]
    plot = line_chart("T", curves, x_label="x", y_label="y")
    assert plot["alt"] == "T: y over x; a from 1.000 to 3.000"
    assert len(plot["curves"][0]["dots"]) == 2 and plot["curves"][1]["points"] == ""
    first, last = plot["curves"][0]["dots"]
    assert first == (52, 136) and last == (312, 8)  # the corners: y grows upwards
    assert line_chart("T", curves[1:], x_label="x", y_label="y") is None
    flat = line_chart("T", [Curve("a", [0, 1], [2.0, 2.0])], x_label="x", y_label="y")
    assert flat["curves"][0]["dots"][0][1] == (8 + 136) / 2


def test_the_command_writes_a_page(opened, tmp_path, capsys):
    target = tmp_path / "page.html"
    words = ["explore", "text", "--prompt", "abc", "--max-new", "2", "--export", str(target)]
    assert dispatcher.run(words) == 0
    assert capsys.readouterr().out == f"{target}\n"
    page = target.read_text()
    assert page.startswith("<!DOCTYPE html>") and 'data-position="4"' in page
    assert explore.main(["text", "--export", str(tmp_path / "no" / "page.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [target]


def test_the_first_answer_of_the_quick_start_takes_less_than_two_seconds(runs, opened):
    """Of processor time, by one thread: the time that a person waits where nothing else runs."""
    _, small = runs["text"]
    for name in ("quickstart", "quickstart_baseline"):
        config = load_config(shipped_folder() / f"{name}.yaml")
        content = load_manifest(small.data.manifest).content.size
        model = config.model.model_copy(update={"vocabulary_size": content})
        data = config.data.model_copy(
            update={"manifest": small.data.manifest, "context_length": 64}
        )
        config = config.model_copy(update={"model": model, "data": data})
        runs[name] = (WorldModel(config).eval(), config)
    explorer = opened("quickstart", "--against", "quickstart_baseline")
    started = time.process_time()
    page = explorer.page({"prompt": "The queryset"})
    assert time.process_time() - started < 2
    assert page.count("<section data-position") == 16


def test_what_cannot_be_shown_is_one_line(opened, runs, capsys, maze_manifest):
    for words, said in [
        (["text", "--against", "mazes"], "--against mazes: has a vocabulary of"),
        (["plain", "--num-steps", "3"], "a Transformer++ does not think"),
        (["text", "--max-new", "99"], "new tokens is '99': give a whole number from 0 to 32"),
        (["mazes", "--instances", "0"], "--instances is 0: must be at least 1"),
        (["mazes", "--instance", "9"], "instance is '9': give a whole number from 1 to 6"),
    ]:
        assert explore.main(words) == 2
        printed = capsys.readouterr().err
        assert said in printed and printed.count("\n") == 1


def test_another_tokenizer_is_refused(opened, runs):
    model, config = runs["second"]
    data = config.data.model_copy(update={"tokenizer_sha256": "0" * 64})
    runs["second"] = (model, config.model_copy(update={"data": data}))
    with pytest.raises(DataError, match="its tokenizer has sha256"):
        opened("text", "--against", "second")
