"""Checkpoints in the layout of the released EBT code: the golden ones, and how to write one."""

import json
from pathlib import Path

import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = sorted((ROOT / "tests" / "golden").glob("*.safetensors"))
SILENT = {"say": lambda _: None}


def golden(path):
    with safe_open(str(path), "pt") as file:
        case = json.loads(file.metadata()["case"])
        return {
            name.removeprefix("state_dict/"): file.get_tensor(name)
            for name in file.keys()
            if name.startswith("state_dict/")
        }, case["hparams"]


def lightning(path, weights, hparams):
    torch.save(
        {
            "state_dict": {f"model.{name}": tensor for name, tensor in weights.items()},
            "hyper_parameters": hparams,
        },
        path,
    )
    return path
