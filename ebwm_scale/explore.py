"""See a trained model think, in the browser.

    ebwm explore RUN [--against RUN] [--prompt TEXT]        prints an address to open
    ebwm explore RUN --prompt TEXT --export page.html       writes one page, and no server
    ebwm explore RUN [--instance N] [--instances 32]        a run on tasks
    ebwm explore RUN [--episode N] [--first N] [--goal N]   a run on video, or on a world

RUN is a run folder or a checkpoint folder. Of a model of text: a prompt's positions and new tokens,
each with its candidates, their probabilities and energies step by step, the energy between two
candidates and on a plane, what one more step would do, and the steps until a position settles. Of a
model of tasks: a held-out instance with the answer after each step, and what is solved by then. Of
a model of video or of a world: a held-out clip or episode with the next frame after each step,
wrong frames as its energy finds them, imagined futures, chosen actions and a plan, as films.
Another run, or Transformer++, stands beside it (--against). The numbers are those of `ebwm think`.

The page is served on this machine's loopback address alone, under a secret token that is part of
the printed address, and loads nothing from other hosts. On a cluster forward the port:
ssh -L 8000:127.0.0.1:8000 NODE, with --port 8000. An interrupt (Ctrl-C) ends it. The server needs
pip install 'ebwm_scale[explore]'; --export does not.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ebwm_scale.checkpoint.load import load_checkpoint
from ebwm_scale.config.schema import Config
from ebwm_scale.control.planner import SOLVERS
from ebwm_scale.core.arguments import ArgumentParser, command
from ebwm_scale.core.console import say
from ebwm_scale.core.disk import replace_text
from ebwm_scale.core.errors import EXIT_FINISHED, UserError
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.format.side_files import refuse_another_tokenizer
from ebwm_scale.evaluation.imagination import refuse_another_space
from ebwm_scale.evaluation.solving import Other, is_task
from ebwm_scale.exploring.frame_page import FrameExplorer
from ebwm_scale.exploring.page import Explorer, FramePages, TaskPages, TextPages
from ebwm_scale.exploring.request import FIELDS, TextRequest, read_request
from ebwm_scale.exploring.task_page import TaskExplorer
from ebwm_scale.exploring.text_page import NamedModel, TextExplorer
from ebwm_scale.think import add_thinking_options, manifest_of, rules_of, tokenizer_of
from ebwm_scale.world_model import WorldModel

FRAME_OPTIONS = (
    ("episode", "N", "held-out episode or clip, counted from 0 (default 0)"),
    ("first", "N", "its first frame that is observed (default 0)"),
    ("context", "N", "observed frames (default: half of the trained context)"),
    ("ahead", "N", "imagined frames (default 4)"),
    ("action", "NUMBERS", "an action of your own, in the units of the dataset"),
    ("goal", "N", "the frame that is planned for (default: the last of the horizon)"),
    ("horizon", "N", "steps of a plan (default: what the context has behind its first half)"),
    ("budget", "N", "futures that a plan may imagine (default 64)"),
    ("solver", "NAME", f"of a plan: {', '.join(SOLVERS)} (default {SOLVERS[1]})"),
)
# by option, the fields of the form that have another name
FRAME_FIELDS = {"episode": "number", "context": "num_context", "ahead": "num_ahead"}


@command
def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    explorer = opened(options)
    if options.export is not None:
        try:
            replace_text(options.export, explorer.page(served=False))
        except OSError as error:
            raise UserError(
                f"--export {options.export}: cannot be written: {error.strerror or error}"
            ) from None
        say(str(options.export))
        return EXIT_FINISHED
    try:
        from ebwm_scale.exploring.server import HOST, application, listen, new_token, serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("ebwm"):
            raise
        raise UserError(
            f"the server needs the package {error.name}: pip install 'ebwm_scale[explore]', or "
            "write a page without it: --export page.html"
        ) from None
    listening = listen(options.port)
    token = new_token()
    say(f"http://{HOST}:{listening.getsockname()[1]}/{token}/")
    serve(application(explorer, token), listening)
    return EXIT_FINISHED


def parser() -> argparse.ArgumentParser:
    result = ArgumentParser(description=__doc__)
    result.add_argument("checkpoint", metavar="RUN", help="run folder or checkpoint folder")
    result.add_argument(
        "--against",
        metavar="RUN",
        help="another run on the same kind of data, such as Transformer++, shown beside it",
    )
    result.add_argument(
        "--data", metavar="MANIFEST", help="the dataset's manifest, if it has moved since training"
    )
    result.add_argument(
        "--port",
        type=int,
        default=0,
        metavar="N",
        help="of the loopback address (default: a free one)",
    )
    result.add_argument(
        "--export", type=Path, metavar="FILE", help="write the page to a file, and serve nothing"
    )
    text = result.add_argument_group("text: what the form holds at first")
    text.add_argument("--prompt", default="", metavar="TEXT")
    text.add_argument(
        "--max-new", type=int, default=8, metavar="N", help="new tokens (default %(default)s)"
    )
    text.add_argument(
        "--positions",
        type=int,
        default=8,
        metavar="N",
        help="positions of the prompt's end that are shown (default %(default)s)",
    )
    text.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0: the most probable token (default)",
    )
    text.add_argument("--seed", type=int, default=None, metavar="N", help="default: the run's")
    add_thinking_options(result)
    tasks = result.add_argument_group("tasks")
    tasks.add_argument(
        "--instance", type=int, default=1, metavar="N", help="the one shown first (default 1)"
    )
    tasks.add_argument(
        "--instances",
        type=int,
        default=32,
        metavar="N",
        help="held-out instances to choose from (default %(default)s)",
    )
    frames = result.add_argument_group("video and worlds: what the form holds at first")
    for name, metavar, text in FRAME_OPTIONS:
        frames.add_argument(f"--{name}", metavar=metavar, default=None, help=text)
    return result


def opened(options: argparse.Namespace) -> Explorer:
    """The explorer of a run; UserError for one that cannot be shown."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, config = load_checkpoint(options.checkpoint, device=device)
    manifest = manifest_of(options, config)
    other = None
    if options.against is not None:
        other = _other(options.against, config, manifest, device)
    title = _name(options.checkpoint)
    subtitle = _about(model, config)
    if other is not None:
        title += f" and {_name(other.name)}"
        subtitle += f"; beside it: {_about(other.model, other.config)}"
    if config.state.kind != "vocabulary":
        return _frames(options, model, config, manifest, other, title, subtitle)
    if is_task(manifest):
        return _tasks(options, model, config, manifest, other, title, subtitle)
    models = [NamedModel(_name(options.checkpoint), model)]
    if other is not None:
        models.append(NamedModel(_name(other.name), other.model))
    explorer = TextExplorer(models, tokenizer_of(manifest))
    return TextPages(explorer, title, subtitle, _start(options, config))


def _tasks(
    options: argparse.Namespace,
    model: WorldModel,
    config: Config,
    manifest: Manifest,
    other: Other | None,
    title: str,
    subtitle: str,
) -> TaskPages:
    if options.instances < 1:
        raise UserError(f"--instances is {options.instances}: must be at least 1")
    split = open_split(manifest.path, "validation", verify="sizes")
    explorer = TaskExplorer.open(model, config, split, options.instances, other)
    given = {"instance": str(options.instance)}
    if options.num_steps is not None:
        given["most_steps"] = str(options.num_steps)
    return TaskPages(explorer, title, subtitle, explorer.read(given))


def _frames(
    options: argparse.Namespace,
    model: WorldModel,
    config: Config,
    manifest: Manifest,
    other: Other | None,
    title: str,
    subtitle: str,
) -> FramePages:
    if other is not None:
        refuse_another_space(model, other.model)
    models = [NamedModel(_name(options.checkpoint), model)]
    if other is not None:
        models.append(NamedModel(_name(other.name), other.model))
    explorer = FrameExplorer.open(models, open_split(manifest.path, "validation", verify="sizes"))
    rules = rules_of(options, config)  # refuses what a Transformer++ cannot do
    given = {
        name: str(value)
        for name, value in dataclasses.asdict(rules).items()
        if value is not None and name != "accept_only_if_lower"
    }
    for name, *_ in FRAME_OPTIONS:
        value = getattr(options, name)
        if value is not None:
            given[FRAME_FIELDS.get(name, name)] = value
    if rules.accept_only_if_lower:
        given["accept_only_if_lower"] = "on"
    start = explorer.fields.read(given, explorer.start(rules.seed))
    return FramePages(explorer, title, subtitle, start)


def _start(options: argparse.Namespace, config: Config) -> TextRequest:
    """What the command line asks for, read as the form's fields are."""
    rules = rules_of(options, config)  # refuses what a Transformer++ cannot do
    values = {
        "max_new": options.max_new,
        "num_positions": options.positions,
        "num_steps": rules.num_steps,
        "num_starts": rules.num_starts,
        "step_size": rules.step_size,
        "noise": rules.noise,
        "tolerance": rules.tolerance,
        "settled": rules.settled,
        "temperature": options.temperature,
        "seed": rules.seed,
    }
    known = {field.name for field in FIELDS}
    given = {name: str(value) for name, value in values.items() if value is not None}
    assert given.keys() <= known, "the fields of the form"
    given["prompt"] = options.prompt
    if rules.accept_only_if_lower:
        given["accept_only_if_lower"] = "on"
    return read_request(given, TextRequest())


def _other(path: str, ours: Config, manifest: Manifest, device: str) -> Other:
    """The run of --against; UserError where it reads something else."""
    model, config = load_checkpoint(path, device=device)
    if config.state.kind != ours.state.kind:
        kinds = {"vocabulary": "text", "embedding": "video"}
        raise UserError(
            f"--against {path}: a model of {kinds[config.state.kind]}; give one of "
            f"{kinds[ours.state.kind]}"
        )
    if config.state.kind != "vocabulary":
        return Other(model, config, path)
    if config.model.vocabulary_size != manifest.content.size:
        raise UserError(
            f"--against {path}: has a vocabulary of {config.model.vocabulary_size}, the first run "
            f"one of {manifest.content.size}: give a run on the same tokens"
        )
    refuse_another_tokenizer(config, manifest)
    return Other(model, config, path)


def _name(path: str | Path) -> str:
    return Path(path).resolve().name


def _about(model: WorldModel, config: Config) -> str:
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters"
    if config.model.kind != "energy":
        return f"Transformer++, {size}"
    steps = config.refinement.num_steps
    return f"energy model, {size}, trained with {steps} {'step' if steps == 1 else 'steps'}"


if __name__ == "__main__":
    sys.exit(main())
