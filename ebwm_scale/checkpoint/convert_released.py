"""The released EBT layout to and from converted folders."""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebwm_scale.checkpoint import released_ebt as released
from ebwm_scale.checkpoint.comparison import DTYPES, Say, compare, kept_if_equal
from ebwm_scale.checkpoint.load import expected_shapes, refuse_mismatches
from ebwm_scale.checkpoint.model_folder import ModelFolder, write_model
from ebwm_scale.checkpoint.reader import saved_config
from ebwm_scale.core.disk import replacement
from ebwm_scale.core.errors import CheckpointError, ConfigError
from ebwm_scale.core.progress import Progress, counted, no_progress
from ebwm_scale.core.tensor_files import TensorFile
from ebwm_scale.data.format.side_files import open_manifest


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
            mask_documents=False,  # as it was trained, whatever its next dataset says
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
    return kept_if_equal(
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
    return kept_if_equal(
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
        content = load_plain(path)
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


def load_plain(path: Path) -> Any:
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


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
