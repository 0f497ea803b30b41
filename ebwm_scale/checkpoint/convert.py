"""Conversions between run folders, converted folders (checkpoint/model_folder.py) and the released
EBT layout, each compared with its source before it is said to be done.

    run folder  --export_run-->  folder  --import_run-->  run folder
    released    --import_released-->  folder  --export_released-->  released .ckpt

A run folder may be of any ZeRO stage and any number of processes, on either side. What is released
is read as .ckpt, .pt or .safetensors.

Weights are compared tensor by tensor, one at a time; up to FULL_BYTES of them also energies, loss
and gradients of both models on a fixed batch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebwm_scale.checkpoint.comparison import DTYPES, Say, compare, kept_if_equal
from ebwm_scale.checkpoint.convert_released import load_plain
from ebwm_scale.checkpoint.files import manifest_text
from ebwm_scale.checkpoint.load import Weights, expected_shapes, refuse_mismatches
from ebwm_scale.checkpoint.model_folder import TRAINING, ModelFolder, Training, inside, write_model
from ebwm_scale.checkpoint.parameter_shard import AVERAGE, MOMENTS, MOMENTUM, OF_WEIGHTS
from ebwm_scale.checkpoint.reader import (
    VERSION,
    CheckpointReader,
    checkpoint_name,
    find_latest,
    load_replay,
    saved_config,
    verify,
)
from ebwm_scale.config.load import load_config
from ebwm_scale.config.schema import Config
from ebwm_scale.core.code_version import code_version
from ebwm_scale.core.errors import CheckpointError, ConfigError, DataError
from ebwm_scale.core.files import file_sha256
from ebwm_scale.core.progress import Progress, counted, no_progress
from ebwm_scale.core.tensor_files import TensorFile, TensorWriter
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.format.side_files import open_manifest, refuse_another_tokenizer


def export_run(
    source: Path,
    folder: Path,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 10**9,
    training: bool = False,
    weights: Weights = "trained",
    data: Path | None = None,
    say: Say = print,
    progress: Progress = no_progress,
) -> str:
    """A run's newest good checkpoint (or a checkpoint folder) as a converted folder.

    training: with what a resumed run needs. weights: trained, or ema for their average. Returns
    what was compared.
    """
    saved = (
        verify(source)
        if (source / "manifest.json").exists()
        else find_latest(source / "checkpoints", lambda text: say(f"warning: {text}"))
    )
    if saved is None:
        raise CheckpointError(
            f"{source}: neither a run folder with checkpoints nor a checkpoint folder"
        )
    if training and dtype != "float32":
        raise ConfigError(
            f"--dtype {dtype} with --training: a run goes on from its float32 weights; leave one "
            "of them out"
        )
    config, state = saved_config(saved.folder), CheckpointReader(saved.folder)
    kind = "weight"
    if weights == "ema":
        state.refuse_without_average(saved.folder)
        kind = AVERAGE
        if training:
            raise ConfigError(
                "--weights ema with --training: a run goes on from its trained weights, and the "
                "average goes with them; leave one of them out"
            )
    elif config.optimizer.name == "schedule_free" and not training:
        say(
            "note: these are the weights where schedule-free AdamW takes its gradients; the result "
            "of the run is their average, which --weights ema exports"
        )
    shapes = {name: tuple(shape) for name, shape in state.shapes.items()}
    refuse_mismatches(expected_shapes(config), shapes, saved.folder)

    def whole(name: str) -> Tensor:
        return state.read(name, kind).view(shapes[name])

    # each is read twice: to be written, and to be compared
    read = counted(whole, "tensors", 2 * len(shapes), progress)
    rest = None
    if training:
        further = [kind for kind in (MOMENTUM, *OF_WEIGHTS) if state.holds(kind)]
        kinds = (*MOMENTS, *further)
        rest = Training(state.read, saved.trainer, load_replay(saved), kinds)
    write_model(
        folder,
        config,
        shapes,
        read,
        dtype=DTYPES[dtype],
        source={
            "checkpoint": str(saved.folder),
            "step": saved.step,
            "weights": weights,
            "code": code_version(),
        },
        manifest=dataset_of(config, data, say),
        max_shard_bytes=max_shard_bytes,
        training=rest,
        say=say,
    )
    return kept_if_equal(
        folder,
        lambda: compare(config, read, ModelFolder(folder, verify=False).read, dtype=DTYPES[dtype]),
        shutil.rmtree,
    )


def import_run(
    folder: Path,
    run: Path,
    *,
    zero_stage: int | None = None,
    world_size: int | None = None,
    overrides: Sequence[str] = (),
    say: Say = print,
    progress: Progress = no_progress,
) -> str:
    """A run folder that resumes where the exported one stood (`training`), or starts from its
    weights.

    Settings that reach beyond the folder are dropped and named (FOREIGN): the folder may be
    somebody else's. overrides: section.key=value of the command line, applied after that. Returns
    what was compared.
    """
    source = ModelFolder(folder)
    if run.exists():
        raise CheckpointError(f"{run} exists: nothing is overwritten; name a new run folder")
    config = _imported_config(folder, overrides, say)
    if zero_stage is not None:
        config = config.replace(deepspeed=config.deepspeed.replace(zero_stage=zero_stage))
    if source.facts["dtype"] not in ("float32",):
        say(f"weights are {source.facts['dtype']}: the run starts from them as float32")
    shapes, moments = source.shapes(), {}
    read = counted(source.read, "tensors", 2 * len(shapes), progress)  # written, and compared
    refuse_mismatches(expected_shapes(config), shapes, folder)
    trainer: dict[str, Any]
    if (folder / TRAINING).is_dir():
        trainer = _read_trainer(folder)
        for path in sorted((folder / TRAINING).glob("*.safetensors")):
            file = TensorFile(inside(folder, str(path.relative_to(folder))))
            kind = path.name.partition("-")[0]
            found = {name: file.shape(name) for name in file.names()}
            kinds = (*MOMENTS, MOMENTUM, *OF_WEIGHTS)
            if kind not in kinds or any(shapes.get(name) != found[name] for name in found):
                raise CheckpointError(f"{path}: not the {' or '.join(kinds)} of these weights")
            moments |= {f"{kind}/{name}": (file, name) for name in file.names()}
    else:
        say(
            "no training state was exported: the run starts at step 0 with these weights and "
            "fresh moments"
        )
        trainer = {"version": VERSION, "step": 0, "updates": 0.0}
    trainer["world_size"] = world_size or trainer.get("world_size", 1)
    staging = run.with_name(f".{run.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    target = staging / "checkpoints" / checkpoint_name(trainer["step"])
    target.mkdir(parents=True)
    try:
        held = {f"weight/{name}": shape for name, shape in shapes.items()} | {
            name: shapes[name.partition("/")[2]] for name in moments
        }
        facts = {
            "ranges": json.dumps(
                {name: [0, torch.Size(shape).numel()] for name, shape in shapes.items()}
            ),
            "shapes": json.dumps({k: list(v) for k, v in shapes.items()}),
        }
        with TensorWriter(
            target / "state-00000-of-00001.safetensors",
            {name: (torch.float32, (torch.Size(shape).numel(),)) for name, shape in held.items()},
            facts,
        ) as file:
            for name in held:
                kind, _, parameter = name.partition("/")
                tensor = read(parameter) if kind == "weight" else moments[name][0].read(parameter)
                file.write(name, tensor.float().view(-1))
        if (folder / TRAINING / "replay.pt").exists():
            replay = inside(folder, f"{TRAINING}/replay.pt")
            load_plain(replay)
            shutil.copyfile(replay, target / "replay_rank_0.pt")
        (target / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        (target / "trainer.json").write_text(json.dumps(trainer, indent=1), encoding="utf-8")
        entries = {
            path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(target.iterdir())
        }
        (target / "manifest.json").write_text(manifest_text(entries), encoding="utf-8")
        (staging / "checkpoints" / "latest").write_text(target.name + "\n", encoding="utf-8")
        (staging / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        os.replace(staging, run)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    state = CheckpointReader(run / "checkpoints" / target.name)
    return kept_if_equal(
        run,
        lambda: compare(
            config,
            read,
            lambda name: state.read(name).view(shapes[name]),
            dtype=torch.float32,
        ),
        shutil.rmtree,
    )


FOREIGN = {  # settings of a received folder that an import drops: what they are set to instead
    "data.manifest": "null",  # paths of another machine
    "data.sources": "[]",
    "data.stream": "[]",  # pipe: commands, URLs
    "checkpoint.remote": "null",  # would be written to
    "evaluation.sets": "[]",
    "evaluation.questions": "[]",
    "evaluation.tasks": "[]",  # YAML files of the harness run code
    "evaluation.tasks_path": "null",
    "checkpoint.best": "null",  # may be by one of these
    # DeepSpeed imports what some of its keys name, and writes where others say
    "deepspeed.raw": "{}",
    "logging.wandb": "off",  # would send to the importer's account
}


def _imported_config(folder: Path, overrides: Sequence[str], say: Say) -> Config:
    """The folder's configuration without FOREIGN settings, which are named; then the user's own
    overrides.
    """
    path = inside(folder, "config.yaml")
    received = load_config(path).to_dict()
    cleared = [f"{name}={value}" for name, value in FOREIGN.items()]
    config = load_config(path, cleared)
    for name in FOREIGN:
        section, _, key = name.partition(".")
        value = received[section][key]
        if value != config.to_dict()[section][key]:
            say(
                f"dropped {name}, which was {str(value)[:80]!r}: not taken from a received folder; "
                f"give your own with --set {name}=..."
            )
    return load_config(path, [*cleared, *overrides]) if overrides else config


def _read_trainer(folder: Path) -> dict[str, Any]:
    """training/trainer.json; CheckpointError for what a run could not go on from."""
    path = inside(folder, f"{TRAINING}/trainer.json")
    try:
        trainer = json.loads(path.read_text(encoding="utf-8"))
        step = trainer["step"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no training state ({str(error)[:80]})") from None
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise CheckpointError(
            f"{path}: step is {str(step)[:80]!r}: must be a whole number, 0 or more"
        )
    return trainer


def dataset_of(config: Config, data: Path | None, say: Say) -> Manifest | None:
    """The manifest whose tokenizer or encoder the folder is to carry; None, with a word, where it
    is not there any more.
    """
    path = data or config.data.manifest
    if path is None and config.data.sources:
        path = config.data.sources[0].manifest
    try:
        if path is None:
            raise DataError("the configuration names no dataset")
        manifest = open_manifest(path)
        refuse_another_tokenizer(config, manifest)
        return manifest
    except DataError as error:
        if data is not None:
            raise
        say(
            f"warning: without tokenizer or encoder: {error}; name the dataset with --data to "
            "include it"
        )
        return None
