"""A model in one folder that needs nothing else: weights as safetensors, configuration, and what
its data's tokenizer or encoder needs.

    model.safetensors     or model-00001-of-00003.safetensors ... with
                          model.safetensors.index.json, as Hugging Face shards them
    config.yaml           the resolved configuration
    config.json           the same for transformers (integrations/transformers.py)
    data/manifest.json    the dataset's description without its shards; beside it
                          tokenizer.model or encoder.safetensors
    training/             optional, to resume: exp_avg, exp_avg_sq, and where the run has them
                          momentum_buffer and ema, as safetensors; trainer.json, replay.pt
    conversion.json       where it came from, sizes and sha256 of every file; written last:
                          without it the folder is not complete

One tensor is in memory at a time, whatever the size of the model.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebwm_scale.checkpoint.parameter_shard import MOMENTS
from ebwm_scale.config.schema import Config
from ebwm_scale.core.errors import CheckpointError
from ebwm_scale.core.files import file_sha256, read_small
from ebwm_scale.core.plain_text import shorten, shown
from ebwm_scale.core.strict_json import is_whole, parse
from ebwm_scale.core.tensor_files import TensorFile, TensorWriter
from ebwm_scale.data.format.manifest import MANIFEST_NAME, Manifest

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FACTS = "conversion.json"
TRAINING = "training"
MODEL_TYPE = "ebwm"
MAX_FACTS_BYTES = 256 * 2**20
READ = ("config.yaml", "config.json", WEIGHTS, INDEX, "data/*", f"{TRAINING}/*")
Read = Callable[[str], Tensor]


def is_consolidated(folder: Path) -> bool:
    return (folder / FACTS).exists() and ((folder / WEIGHTS).exists() or (folder / INDEX).exists())


class ModelFolder:
    """The weights of a consolidated folder.

    Raises CheckpointError for one that is not complete, or whose files are not what they were.
    """

    def __init__(self, folder: Path, *, verify: bool = True):
        self.folder = folder
        self.facts = _read_facts(folder)
        for name, entry in self.facts["files"].items() if verify else ():
            path = inside(folder, name)
            if not path.is_file():
                raise CheckpointError(f"{path} is missing")
            size = path.stat().st_size
            if size != entry["size"]:
                raise CheckpointError(f"{path} has {size} bytes, {FACTS} says {entry['size']}")
            if file_sha256(path) != entry["sha256"]:
                raise CheckpointError(f"{path} does not match its hash: damaged")
        if verify:
            _refuse_unlisted(folder, self.facts["files"])
        self.files = {
            name: file
            for path in _weight_files(folder)
            for file in [TensorFile(path)]
            for name in file.names()
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: file.shape(name) for name, file in self.files.items()}

    def read(self, name: str) -> Tensor:
        return self.files[name].read(name)


def _weight_files(folder: Path) -> list[Path]:
    if not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    try:
        mapped = parse(read_small(folder / INDEX, MAX_FACTS_BYTES))["weight_map"]
        names = sorted(set(mapped.values()))
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"its files are {shown(names)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / INDEX}: no list of weight files ({shorten(str(error))}): damaged"
        ) from None
    return [inside(folder, name) for name in names]


def _read_facts(folder: Path) -> dict[str, Any]:
    """conversion.json, its list of files checked; CheckpointError for anything else."""
    try:
        facts = parse(read_small(folder / FACTS, MAX_FACTS_BYTES))
        files, dtype = facts["files"], facts["dtype"]
        listed = all(
            is_whole(entry["size"]) and isinstance(entry["sha256"], str) for entry in files.values()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: no complete converted model ({FACTS}: {shorten(str(error))})"
        ) from None
    if not listed or not isinstance(dtype, str):
        raise CheckpointError(f"{folder}: no complete converted model ({FACTS}: not as written)")
    return facts


def inside(folder: Path, name: str) -> Path:
    """A file of a converted folder by the name a file in it gives; CheckpointError for one that
    leads outside.

    Links count as what they lead to: a folder from somebody else could otherwise read other
    people's files.
    """
    path = folder / str(name)
    if "\0" in str(name) or not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(
            f"{folder}: names a file outside of it, {str(name)[:80]!r}: refused; "
            "a converted folder holds its own files, convert again"
        )
    return path


def _refuse_unlisted(folder: Path, files: Mapping[str, Any]) -> None:
    """What is read must be what was hashed: CheckpointError for another file where the readers
    look.
    """
    looked_for = [
        path for pattern in READ for path in sorted(folder.glob(pattern)) if not path.is_dir()
    ]
    for path in looked_for:
        name = str(path.relative_to(folder))
        if name not in files:
            raise CheckpointError(
                f"{path} is not listed in {FACTS}: damaged or added; convert again"
            )


def write_model(
    folder: Path,
    config: Config,
    shapes: Mapping[str, tuple[int, ...]],
    read: Read,
    *,
    dtype: torch.dtype,
    source: dict[str, Any],
    manifest: Manifest | None,
    max_shard_bytes: int,
    training: Training | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Write a folder.

    read(name) gives a weight in its shape; floating point ones are stored as dtype. Raises
    CheckpointError if the folder is there already.

    The folder appears when everything in it is complete.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists: nothing is overwritten; name a new folder")
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        _write_weights(staging, shapes, read, dtype, max_shard_bytes, say)
        (staging / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        described = {
            "model_type": MODEL_TYPE,
            "architectures": ["EbwmModel"],
            "torch_dtype": str(dtype).removeprefix("torch."),
            "ebwm": config.to_dict(),
        }
        (staging / "config.json").write_text(json.dumps(described, indent=1), encoding="utf-8")
        if manifest is not None:
            (staging / "data").mkdir()
            (staging / "data" / MANIFEST_NAME).write_text(
                json.dumps(manifest.values | {"splits": {}}, indent=1), encoding="utf-8"
            )
            for path in manifest.content.files():
                shutil.copyfile(path, staging / "data" / path.name)
        if training is not None:
            training.write(staging / TRAINING, shapes, max_shard_bytes, say)
        files = {
            str(path.relative_to(staging)): {
                "size": path.stat().st_size,
                "sha256": file_sha256(path),
            }
            for path in sorted(staging.rglob("*"))
            if path.is_file()
        }
        (staging / FACTS).write_text(
            json.dumps(
                {
                    "format": 1,
                    "dtype": str(dtype).removeprefix("torch."),
                    "source": source,
                    "files": files,
                },
                indent=1,
            ),
            encoding="utf-8",
        )
        os.replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


class Training:
    """What a run goes on from, beside the weights.

    read(name, kind) -> flat float32 numbers of one of `kinds`; trainer: trainer.json; replay: the
    merged buffer, or None.
    """

    def __init__(
        self,
        read: Callable[[str, str], Tensor],
        trainer: dict[str, Any],
        replay: dict | None,
        kinds: tuple[str, ...] = MOMENTS,
    ):
        self.read = read
        self.trainer = trainer
        self.replay = replay
        self.kinds = kinds

    def write(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        max_shard_bytes: int,
        say: Callable[[str], None],
    ) -> None:
        folder.mkdir()
        for kind in self.kinds:
            for number, names in enumerate(_groups(shapes, torch.float32, max_shard_bytes)):
                say(f"{kind} {number + 1}")
                with TensorWriter(
                    folder / f"{kind}-{number:05d}.safetensors",
                    {name: (torch.float32, shapes[name]) for name in names},
                ) as file:
                    for name in names:
                        file.write(name, self.read(name, kind).view(shapes[name]))
        (folder / "trainer.json").write_text(json.dumps(self.trainer, indent=1), encoding="utf-8")
        if self.replay is not None:
            torch.save(self.replay, folder / "replay.pt")


def _write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Read,
    dtype: torch.dtype,
    max_shard_bytes: int,
    say: Callable[[str], None],
) -> None:
    groups, done = _groups(shapes, dtype, max_shard_bytes), 0
    mapped, total = {}, sum(torch.Size(shape).numel() for shape in shapes.values())
    for number, names in enumerate(groups):
        name_of_file = (
            WEIGHTS
            if len(groups) == 1
            else f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        )
        with TensorWriter(
            folder / name_of_file, {name: (dtype, shapes[name]) for name in names}
        ) as file:
            for name in names:
                file.write(name, read(name).to(dtype).view(shapes[name]))
                mapped[name], done = name_of_file, done + torch.Size(shapes[name]).numel()
        say(f"{name_of_file}: {done / total:.0%} of {total:,} numbers")
    if len(groups) > 1:
        (folder / INDEX).write_text(
            json.dumps(
                {"metadata": {"total_size": total * dtype.itemsize}, "weight_map": mapped}, indent=1
            ),
            encoding="utf-8",
        )


def _groups(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_bytes: int
) -> list[list[str]]:
    """Names in their order, as many to a file as fit; a tensor is never cut."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        more = torch.Size(shape).numel() * dtype.itemsize
        if groups[-1] and size + more > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += more
    return groups
