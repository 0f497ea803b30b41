"""Which code computes a model's attention and pointwise operations, in words."""

from __future__ import annotations

import torch

from ebwm_kernels.attention.first_order import (
    KNOWS_NO_GROUPS,
    resolve_observed_backend,
    why_not_flash_attn,
)
from ebwm_kernels.attention.ops import resolve_backend, why_not_triton
from ebwm_kernels.fused.launches import resolve_fused, why_not_fused
from ebwm_scale.config.resolved import model_sizes
from ebwm_scale.config.schema import ModelConfig


def attention_paths(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    has_groups: bool = False,
    has_documents: bool = False,
) -> dict[str, str]:
    """Which code computes each stream's attention and what is pointwise, and why not another: said
    at a run's start.

    has_groups: whether the observed stream is block-causal. has_documents: whether attention stops
    at documents (data.mask_documents).

    Raises ValueError where the configuration forces a backend that cannot run.
    """
    paths = (
        _paths_of_attention(config, device, dtype, has_groups, has_documents)
        if config.reach is None
        else _paths_within_reach(config)
    )
    return paths | {"pointwise": _pointwise_path(config, device, dtype)}


def _paths_within_reach(config: ModelConfig) -> dict[str, str]:
    path = "plain PyTorch (model.reach: kernels know no grid)"
    streams = ("observed", "predicted") if config.kind == "energy" else ("observed",)
    return dict.fromkeys(streams, path)


def _paths_of_attention(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    has_groups: bool,
    has_documents: bool,
) -> dict[str, str]:
    d = model_sizes(config).head_dimension
    observed = resolve_observed_backend(
        config.observed_backend,
        device,
        dtype,
        d,
        is_masked=has_groups,
        has_documents=has_documents,
    )
    if observed == "flash_attn" and has_documents:
        observed += " (a sequence per document)"
    obstacle = why_not_flash_attn(device, dtype, d)
    if config.observed_backend == "auto" and obstacle is None and has_groups:
        obstacle = KNOWS_NO_GROUPS
    if config.observed_backend == "auto" and obstacle:
        observed += f" (flash_attn: {obstacle})"
    paths = {"observed": observed}
    if config.kind == "energy":
        predicted = resolve_backend(
            config.attention_backend, device, dtype, d, "model.attention_backend"
        )
        obstacle = why_not_triton(device, dtype, d)
        if config.attention_backend == "auto" and obstacle:
            predicted += f" (triton: {obstacle})"
        paths["predicted"] = predicted
    return paths


def _pointwise_path(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    pointwise = resolve_fused(
        config.attention_backend,
        device,
        dtype,
        "model.attention_backend",
        model_sizes(config).width,
    )
    obstacle = why_not_fused(device, dtype, model_sizes(config).width)
    if config.attention_backend == "auto" and obstacle:
        pointwise += f" (triton: {obstacle})"
    return pointwise
