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

import argparse
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebwm_scale.checkpoint import released_ebt as released
from ebwm_scale.checkpoint.files import manifest_text
from ebwm_scale.checkpoint.load import build, expected_shapes, refuse_mismatches
from ebwm_scale.checkpoint.model_folder import TRAINING, ModelFolder, Training, inside, write_model
from ebwm_scale.checkpoint.reader import (
    VERSION,
    CheckpointReader,
    checkpoint_name,
    find_latest,
    load_replay,
    saved_config,
    verify,
)
from ebwm_scale.config import resolved
from ebwm_scale.config.load import load_config
from ebwm_scale.config.schema import Config
from ebwm_scale.core.code_version import code_version
from ebwm_scale.core.disk import replacement
from ebwm_scale.core.errors import CheckpointError, ConfigError, DataError
from ebwm_scale.core.files import file_sha256
from ebwm_scale.core.progress import Progress, counted, no_progress
from ebwm_scale.core.tensor_files import TensorFile, TensorWriter
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.format.side_files import open_manifest, refuse_another_tokenizer
from ebwm_scale.refinement.noise import NoiseSource

FULL_BYTES = 2**28  # of weights up to which whole models are built and compared
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
MOMENTS = ("exp_avg", "exp_avg_sq")
Say = Callable[[str], None]


def export_run(
    source: Path,
    folder: Path,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 10**9,
    training: bool = False,
    data: Path | None = None,
    say: Say = print,
    progress: Progress = no_progress,
) -> str:
    """A run's newest good checkpoint (or a checkpoint folder) as a converted folder.

    training: with what a resumed run needs. Returns what was compared.
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
    shapes = {name: tuple(shape) for name, shape in state.shapes.items()}
    refuse_mismatches(expected_shapes(config), shapes, saved.folder)

    def whole(name: str) -> Tensor:
        return state.read(name).view(shapes[name])

    # each is read twice: to be written, and to be compared
    read = counted(whole, "tensors", 2 * len(shapes), progress)
    rest = Training(state.read, saved.trainer, load_replay(saved)) if training else None
    write_model(
        folder,
        config,
        shapes,
        read,
        dtype=DTYPES[dtype],
        source={"checkpoint": str(saved.folder), "step": saved.step, "code": code_version()},
        manifest=dataset_of(config, data, say),
        max_shard_bytes=max_shard_bytes,
        training=rest,
        say=say,
    )
    return _checked(
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
            if kind not in MOMENTS or any(shapes.get(name) != found[name] for name in found):
                raise CheckpointError(f"{path}: not the {' or '.join(MOMENTS)} of these weights")
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
            _refuse_code(replay)
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
    return _checked(
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


def import_released(
    source: Path,
    folder: Path,
    *,
    hparams: Path | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 10**9,
    data: Path | None = None,
    say: Say = print,
    progress: Progress = no_progress,
) -> str:
    """A released Lightning .ckpt, or a bare state dict (.pt, .safetensors) with its
    hyper-parameters as JSON, as a converted folder.
    """
    weights, known = read_released(source)
    if hparams is not None:
        try:
            known = json.loads(hparams.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{hparams}: cannot be read as JSON: {error}") from None
    if not isinstance(known, Mapping):
        raise ConfigError(
            f"{source}: a state dict without hyper-parameters; give them with --hparams FILE.json"
        )
    try:
        config = released.config_of(
            known, {name: tuple(tensor.shape) for name, tensor in weights.items()}
        )
    except KeyError as error:
        raise ConfigError(
            f"{hparams or source}: the hyper-parameters or weights lack {error}"
        ) from None
    config = config.replace(
        data=config.data.replace(
            context_length=known.get("context_length") or config.data.context_length or 256,
        ),
    )
    ours = released.to_ours(weights)
    encoder = [name for name in weights if name.startswith(released.FROZEN_ENCODER)]
    if encoder:
        say(f"left out {len(encoder)} tensors of the frozen image encoder: it belongs to the data")
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(
            f"{source}: holds numbers that are not finite in {', '.join(broken)[:80]}: "
            "nothing can be predicted with these weights"
        )
    refuse_mismatches(
        expected_shapes(config),
        {name: tuple(tensor.shape) for name, tensor in ours.items()},
        source,
    )
    shapes = expected_shapes(config)
    read = counted(ours.__getitem__, "tensors", 2 * len(shapes), progress)  # written, and compared
    write_model(
        folder,
        config,
        shapes,
        read,
        dtype=DTYPES[dtype],
        source={
            "released": str(source),
            "hyper_parameters": {k: v for k, v in known.items() if _is_plain(v)},
        },
        manifest=None if data is None else open_manifest(data),
        max_shard_bytes=max_shard_bytes,
        say=say,
    )
    return _checked(
        folder,
        lambda: compare(config, read, ModelFolder(folder, verify=False).read, dtype=DTYPES[dtype]),
        shutil.rmtree,
    )


def export_released(folder: Path, target: Path, *, say: Say = print) -> str:
    """A converted folder as a Lightning .ckpt of the released layout: {"state_dict":
    {"model.alpha": ...}, "hyper_parameters": {...}}.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists: nothing is overwritten; name a new file")
    source, config = ModelFolder(folder), saved_config(folder)
    ours, config = released.as_released({name: source.read(name) for name in source.files}, config)
    content = {
        "state_dict": {
            f"model.{name}": tensor for name, tensor in released.to_released(ours, config).items()
        },
        "hyper_parameters": released.hparams_of(config)
        | {"context_length": config.data.context_length},
        "pytorch-lightning_version": "2.0.0",
    }
    with replacement(target) as temporary:
        torch.save(content, temporary)
    again = released.to_ours(read_released(target)[0])
    return _checked(
        target,
        lambda: compare(
            config, ours.__getitem__, again.__getitem__, dtype=next(iter(ours.values())).dtype
        ),
        Path.unlink,
    )


def read_released(path: Path) -> tuple[dict[str, Tensor], Any]:
    """(state dict under released names, hyper-parameters or None).

    A pickle is read with weights_only: one that carries code is refused.
    """
    if path.suffix == ".safetensors":
        file = TensorFile(path)
        return {name: file.read(name) for name in file.names()}, None
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = _refuse_code(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}: expected a state dict or a Lightning "
            "checkpoint"
        )
    weights = content.get("state_dict", content)
    if (
        not isinstance(weights, Mapping)
        or not weights
        or not all(isinstance(tensor, Tensor) for tensor in weights.values())
    ):
        raise CheckpointError(f"{path}: holds no state dict: expected names and tensors")
    if all(name.startswith("model.") for name in weights):  # Lightning's module holds the model
        weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    hparams = content.get("hyper_parameters") if weights is not content else None
    return dict(weights), vars(hparams) if isinstance(hparams, argparse.Namespace) else hparams


def _refuse_code(path: Path) -> Any:
    """The content of a PyTorch file of tensors and plain values; CheckpointError for every other
    file.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = next(
            (line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line),
            str(error).splitlines()[0],
        )
        raise CheckpointError(
            f"{path}: refused: it holds more than tensors and plain values, and unpickling that "
            f"could run code ({first.strip()[:200]})"
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, IndexError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: no PyTorch file, or a truncated one ({reason[:200]})"
        ) from None


def compare(
    config: Config,
    source: Callable[[str], Tensor],
    result: Callable[[str], Tensor],
    *,
    dtype: torch.dtype,
) -> str:
    """What was compared, in words; CheckpointError with the list of what differs.

    Every weight has to be the source's in the given precision, bit for bit. Of models of up to
    FULL_BYTES also energies, loss and gradients have to be equal.
    """
    shapes = expected_shapes(config)
    wrong = [
        f"{name} differs from its source"
        for name in shapes
        if not torch.equal(source(name).to(dtype), result(name))
    ]
    if wrong:
        raise CheckpointError("the result is not its source:\n  " + "\n  ".join(wrong))
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    said = f"{len(shapes)} tensors, {total:,} numbers, equal bit for bit" + (
        "" if dtype == torch.float32 else f" in {str(dtype).removeprefix('torch.')}"
    )
    if 4 * total > FULL_BYTES:
        return said
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    left, right = (
        {name: read(name).to(dtype).to(wide) for name in shapes} for read in (source, result)
    )
    left, right = (behaviour(config, weights) for weights in (left, right))
    wrong = [
        f"{name}: {float(left[name].flatten()[0])} and {float(right[name].flatten()[0])}"
        for name in left
        if not torch.equal(left[name], right[name])
    ]
    if wrong:
        raise CheckpointError(
            "on a fixed batch the result behaves differently from its source:\n  "
            + "\n  ".join(wrong)
        )
    return said + f"; loss, energies and {len(left) - 2} gradients on a fixed batch equal"


def behaviour(config: Config, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss, energies per step and gradients of a model on a fixed batch of 2 samples and 8
    positions; of two groups where positions are grouped.
    """
    model = build(config, weights).train()
    size = resolved.group_size(config)
    num_positions = 8 if size == 1 else 2 * size
    generator, shape = torch.Generator().manual_seed(0), (2, num_positions + size)
    if config.state.kind == "vocabulary":
        states = torch.randint(resolved.vocabulary_size(config), shape, generator=generator)
    else:
        dtype = next(iter(weights.values())).dtype
        dimension = resolved.state_dimension(config)
        states = torch.randn(*shape, dimension, generator=generator).to(dtype)
    output = model(
        states[:, :-size],
        states[:, size:],
        sample_ids=torch.arange(2),
        source=NoiseSource(0, 0),
        keep_state=None,
    )
    output.loss.backward()
    return {
        "loss": output.loss.detach(),
        "energies": output.energy_per_step
        if output.energy_per_step is not None
        else torch.zeros(1),
        **{
            f"gradient of {name}": p.grad
            for name, p in model.named_parameters()
            if p.grad is not None
        },
    }


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


def _checked(target: Path, check: Callable[[], str], remove: Callable[[Path], Any]) -> str:
    """check(), and the target removed if it fails."""
    try:
        return check()
    except CheckpointError as error:
        remove(target)
        raise CheckpointError(f"{error}\nnothing was kept: {target}") from None


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
