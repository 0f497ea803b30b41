"""Run folders as a training leaves them, and what their page says."""

import json
import math
import re
from html.parser import HTMLParser

import yaml
from matplotlib.figure import Figure

from ebwm_scale.report import write_report
from ebwm_scale.reporting.read_run import read_run

UNIGRAM = 6.5


def training_row(step, losses, **more):
    return {
        "step": step,
        "tokens_seen": step * 2048,
        "loss": sum(losses) / len(losses),
        "loss_per_step": losses,
        "energy_per_step": [-0.1 * i for i in range(len(losses))],
        "grad_norm": 0.5 + 1 / step,
        "learning_rate": 0.004,
        "step_size": 30.0,
        "step_time_s": 0.4,
        "tokens_per_s": 5000.0,
        "model_tflops": 0.1,
        "mfu": None,
        "peak_memory_gib": 1.5,
        "eta_s": 1.0,
        **more,
    }


def validation_row(step, losses, **more):
    return {
        "split": "validation",
        "step": step,
        "loss": losses[-1],
        "loss_per_step": losses,
        "initial_loss": 8.9,
        "perplexity": math.exp(min(losses[-1], 50)),
        "unigram_entropy": UNIGRAM,
        "num_tokens": 4096,
        **more,
    }


def baseline_rows(losses):
    return [
        row
        for step, loss in losses.items()
        for row in (
            training_row(step, [loss], energy_per_step=None, step_size=None, step_time_s=0.1),
            validation_row(step, [loss], initial_loss=None),
        )
    ]


LEARNED = [
    training_row(10, [7.0, 6.8]),
    training_row(20, [5.0, 4.6]),
    validation_row(10, [6.8, 6.6]),
    validation_row(20, [5.0, 4.5]),
]


def run_folder(
    folder, rows=LEARNED, *, kind="energy", max_steps=20, complete=True, samples=None, tail=""
):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    if complete:
        (folder / "config.yaml").write_text(
            yaml.safe_dump(
                {
                    "model": {
                        "kind": kind,
                        "size": "4xs",
                        "num_layers": 2,
                        "width": 128,
                        "conditioning": "default",
                    },
                    "state": {"kind": "vocabulary"},
                    "refinement": {"num_steps": 2, "learnable": True, "landscapes": "per_step"},
                    "optimizer": {"learning_rate": 0.004, "gradient_clipping": 1.0},
                    "train": {"max_steps": max_steps, "global_batch_size": 16},
                    "data": {"context_length": 128},
                }
            )
        )
        (folder / "events.jsonl").write_text(
            '{"time": "2026-01-01T00:00:00Z", "event": "start", "step": 0, "world_size": 1}\n'
        )
        (folder / "summary.json").write_text(
            '{"parameters": {"blocks": 230912, "energy_head": 128}, "data": {"documents": 812}}'
        )
        (folder / "samples.json").write_text(
            json.dumps(samples or {"step": 20, "continuations": [continuation()]})
        )
    return folder


def continuation(**more):
    return {
        "prompt": "Once upon",
        "continuation": " a midnight",
        "reference": " a time",
        "positions": [
            {
                "context": "Once upon",
                "truth": " a",
                "truth_energy": -2.25,
                "candidates": [
                    {"token": " the", "probability": 0.4, "energy": -3.5},
                    {"token": " a", "probability": 0.3, "energy": -2.25},
                ],
            }
        ],
        **more,
    }


def page_of(folder, baseline=None):
    path = write_report(folder, baseline_dir=baseline)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def answer_of(page):
    return re.search(r"Did it learn\?</span><strong>(.*?)</strong>", page).group(1)


def checks_of(page):
    """{first words of the claim: (mark, figure, detail)} as a reader sees them."""
    line = (
        r'<li class="(\w+)">.*?class="claim">(.*?)</span>'
        r'<span class="figure">(.*?)</span><span class="detail">(.*?)</span>'
    )
    return {claim: (mark, figure, detail) for mark, claim, figure, detail in re.findall(line, page)}


def check(page, words):
    return next(value for claim, value in checks_of(page).items() if words in claim)


class Reader(HTMLParser):
    """Collects tags, ids and references; fails on tags that do not nest."""

    VOID = {"meta", "path", "use", "rect", "br", "img", "line", "circle"}

    def __init__(self, page):
        super().__init__()
        self.tags, self.ids, self.references, self.open = [], [], [], []
        self.feed(page)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.references += re.findall(
            r"url\(#([^)]+)\)", " ".join(str(v) for v in attributes.values())
        )
        self.references += (
            [attributes["href"][1:]] if attributes.get("href", "").startswith("#") else []
        )
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def drawn(draw, folder, baseline=None):
    """(caption, curve names) of one plot."""
    figure = Figure()
    caption = draw(figure.add_subplot(), read_run(folder), baseline and read_run(baseline))
    return caption, [line.get_label() for line in figure.axes[0].get_lines()]


def set_config(folder, section, **values):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config.setdefault(section, {}).update(values)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
