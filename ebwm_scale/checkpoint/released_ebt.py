"""The released EBT code's names: its state dicts and hyper-parameters <-> ours.

alpha ()                                    step_size (1,)
embeddings.weight (V, D)                    token_embedding.weight
vocab_to_embed.weight (D, V)                state_map (V, D), transposed; absent when tied
                                            (vocab_to_embed_uses_prob_dist)
encoder_down_projection.*                   frame_projection.*
output.weight                               output.weight               of text
output.weight (D, D)                        output.hidden.weight        of a video baseline
encoder_up_projection.*                     output.up.*                 of a video baseline
transformer.layers.N.*                      network.layers.N.*
transformer.layers.N.adaLN_modulation.1.*   network.modulations.N.*
transformer.final_layer.weight              network.head.weight
                                            (final_layer.linear.weight with adaln)
transformer.final_layer.adaLN_modulation.1  network.final_modulation
transformer.time_embeddings.weight          network.landscape_embedding.weight
transformer.norm.weight                     network.norm.weight
langevin_dynamics_noise_std                 refinement.noise, a setting and not a weight
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.config.resolved import model_sizes
from ebwm_scale.config.schema import Config
from ebwm_scale.core.errors import ConfigError

_NAMES = [  # (released, ours) as regular expressions with the same groups
    (r"alpha", r"step_size"),
    (r"embeddings\.weight", r"token_embedding.weight"),
    (r"vocab_to_embed\.weight", r"state_map"),
    (r"encoder_down_projection\.(weight|bias)", r"frame_projection.\1"),
    (r"encoder_up_projection\.(weight|bias)", r"output.up.\1"),
    (r"output\.weight", r"output.weight"),
    (
        r"transformer\.layers\.(\d+)\.adaLN_modulation\.1\.(weight|bias)",
        r"network.modulations.\1.\2",
    ),
    (r"transformer\.layers\.(\d+)\.(.+)", r"network.layers.\1.\2"),
    (
        r"transformer\.final_layer\.adaLN_modulation\.1\.(weight|bias)",
        r"network.final_modulation.\1",
    ),
    (r"transformer\.final_layer\.(?:linear\.)?weight", r"network.head.weight"),
    (r"transformer\.time_embeddings\.weight", r"network.landscape_embedding.weight"),
    (r"transformer\.norm\.weight", r"network.norm.weight"),
]
# Released settings that change predictions and have no counterpart here. What touches the loss
# alone (soft targets, contrastive terms) is not carried over.
ONLY = {
    "ebt_norm": "rms",
    "ebt_act_func": "silu",
    "gaussian_random_noise_scaling": 1.0,
    "normalize_initial_condition_only_first_step": False,
    "num_modality_processing_mlp_layers": 1,
    "learnable_process_memory": False,
    "sharpen_predicted_distribution": 0.0,
    "weight_tie_vae_proj": False,
}
# Entries of a released state dict that are no weights of ours.
SETTINGS = {"langevin_dynamics_noise_std"}
FROZEN_ENCODER = "image_encoder."  # of video: a dataset's encoder here, not the model's


def our_name(released: str) -> str | None:
    """Our parameter's name for a released one; None for a setting and for the frozen image encoder.

    Raises ConfigError for a name that neither knows.
    """
    if released in SETTINGS or released.startswith(FROZEN_ENCODER):
        return None
    for pattern, name in _NAMES:
        if re.fullmatch(pattern, released):
            return re.sub(f"^{pattern}$", name, released)
    raise ConfigError(f"{released}: not a parameter of the released EBT layout")


def to_ours(released: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A released state dict (or gradients under its names) under our names and shapes."""
    result = {}
    two_linear = "encoder_up_projection.weight" in released
    for name, tensor in released.items():
        ours = our_name(name)
        if two_linear and ours == "output.weight":
            ours = "output.hidden.weight"
        if ours is None:
            continue
        if ours == "state_map":
            result[ours] = tensor.T.contiguous()
        elif ours == "step_size":
            result[ours] = tensor.reshape(1)
        else:
            result[ours] = tensor
    return result


def released_name(ours: str, *, conditioning: str) -> str:
    """The released name of our parameter."""
    head = "transformer.final_layer.weight"
    if conditioning in ("adaln", "adaln_zero"):
        head = "transformer.final_layer.linear.weight"
    special = {
        "step_size": "alpha",
        "state_map": "vocab_to_embed.weight",
        "output.weight": "output.weight",
        "output.hidden.weight": "output.weight",
        "network.norm.weight": "transformer.norm.weight",
        "network.head.weight": head,
        "token_embedding.weight": "embeddings.weight",
        "network.landscape_embedding.weight": "transformer.time_embeddings.weight",
    }
    if ours in special:
        return special[ours]
    for pattern, released in (
        (r"frame_projection\.(weight|bias)", r"encoder_down_projection.\1"),
        (r"output\.up\.(weight|bias)", r"encoder_up_projection.\1"),
        (
            r"network\.modulations\.(\d+)\.(weight|bias)",
            r"transformer.layers.\1.adaLN_modulation.1.\2",
        ),
        (r"network\.layers\.(\d+)\.(.+)", r"transformer.layers.\1.\2"),
        (
            r"network\.final_modulation\.(weight|bias)",
            r"transformer.final_layer.adaLN_modulation.1.\1",
        ),
    ):
        if re.fullmatch(pattern, ours):
            return re.sub(f"^{pattern}$", released, ours)
    raise ConfigError(f"{ours}: has no name in the released EBT layout")


def as_released(ours: Mapping[str, Tensor], config: Config) -> tuple[dict[str, Tensor], Config]:
    """The same model in a form that the released layout has: a video baseline's output in two
    linear maps.

    The first of them is the identity where ours has one map, so every prediction stays what it was.
    """
    is_video_baseline = config.model.kind == "baseline" and config.state.kind == "embedding"
    if not is_video_baseline or config.model.output == "two_linear":
        return dict(ours), config
    result = {name: ours[name] for name in ours if not name.startswith("output.")}
    width = model_sizes(config.model).width
    result["output.hidden.weight"] = torch.eye(width, dtype=ours["output.weight"].dtype)
    result["output.up.weight"] = ours["output.weight"]
    result["output.up.bias"] = ours["output.bias"]
    return result, config.replace(model=config.model.replace(output="two_linear"))


def to_released(ours: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Our weights, of a form that as_released gives, under the released names and shapes."""
    result = {}
    for name, tensor in ours.items():
        released = released_name(name, conditioning=config.model.conditioning)
        if name == "state_map":
            result[released] = tensor.T.contiguous()
        elif name == "step_size":
            result[released] = tensor.reshape(())
        else:
            result[released] = tensor
    if config.refinement.noise:
        result["langevin_dynamics_noise_std"] = torch.tensor(config.refinement.noise)
    return result


def hparams_of(config: Config) -> dict[str, Any]:
    """Hyper-parameters of a released run with this configuration.

    Raises ConfigError listing what the released code cannot express.
    """
    model = config.model
    state = config.state
    refinement = config.refinement
    optimizer = config.optimizer
    text, energy = state.kind == "vocabulary", model.kind == "energy"
    beyond = []
    for name, value, allowed in (
        ("model.predicted_input", model.predicted_input, ("state",)),
        ("model.predicted_layers", model.predicted_layers, (None, model.num_layers)),
        ("model.own_keys", model.own_keys, (True,)),
        ("model.reach", model.reach, (None,)),
        ("model.energy_head", list(model.energy_head), (["linear"],)),
        (
            "model.conditioning",
            model.conditioning,
            ("default", "time_embed", "adaln", "adaln_zero"),
        ),
        ("state.map_scale", state.map_scale, (1.0,)),
        ("refinement.update", refinement.update, ("probabilities",)),
        ("refinement.loss_weights", refinement.loss_weights, (None,)),
        ("refinement.backprop_steps", refinement.backprop_steps, (None,)),
        ("refinement.damping", refinement.damping, (0.0,)),
        ("refinement.momentum", refinement.momentum, (0.0,)),
        ("refinement.accept", refinement.accept, ("always",)),
        ("refinement.spectral_penalty", refinement.spectral_penalty, (0.0,)),
        ("refinement.level_weight", refinement.level_weight, (0.0,)),
        ("refinement.decay", refinement.decay, (0.0,)),
        ("state.workspace", state.workspace, (None,)),
        ("refinement.reencode", refinement.reencode, ("none",)),
        ("refinement.candidates", refinement.candidates, (None,)),
        (
            "refinement.change_clamp with a random step size",
            refinement.change_clamp is not None and refinement.step_size_random_factor > 1,
            (False,),
        ),
        ("refinement.min_num_steps", refinement.min_num_steps, (None, refinement.num_steps)),
        ("refinement.replay", refinement.replay, (False,)),
        (
            "refinement.graph",
            (refinement.graph, refinement.loss),
            (("detach", "every"), ("full", "every"), ("truncate", "last")),
        ),
    ):
        if energy and value not in allowed:
            beyond.append(f"{name} is {value!r} (only {' or '.join(map(repr, allowed))})")
    if model.loops > 1:
        beyond.append(f"model.loops is {model.loops} (only one pass)")
    if (config.data.group_size or 1) > 1:
        beyond.append(f"data.group_size is {config.data.group_size} (only groups of 1)")
    if config.data.conditions:
        names = ", ".join(condition.name for condition in config.data.conditions)
        beyond.append(f"data.conditions are {names} (only data without)")
    if model.qk_norm:
        beyond.append("model.qk_norm is True (only False)")
    if model.logit_softcap is not None:
        beyond.append(f"model.logit_softcap is {model.logit_softcap} (only None)")
    if model.parametrization != "standard":
        beyond.append(f"model.parametrization is {model.parametrization} (only standard)")
    if model.predicts != "state":
        beyond.append(f"model.predicts is {model.predicts} (only state)")
    if beyond:
        raise ConfigError("the released layout cannot express this model: " + "; ".join(beyond))
    per_step = refinement.landscapes == "per_step" or refinement.num_steps == 1
    return {
        "modality": "NLP" if text else "VID",
        "model_name": "ebt" if energy else "baseline_transformer",
        "ebt_type": model.conditioning,
        "ebt_norm": "rms",
        "embedding_dim": model.width,
        "num_transformer_blocks": model.num_layers,
        "multiheaded_attention_heads": model.num_heads,
        "normalize_initial_condition": True,
        "vocab_to_embed_uses_prob_dist": state.tie_embedding,
        "denoising_initial_condition": {"most_recent": "most_recent_embedding"}.get(
            state.initial, state.initial
        ),
        "mcmc_num_steps": refinement.num_steps if per_step else 1,
        "randomize_mcmc_num_steps": 0 if per_step else refinement.num_steps - 1,
        "mcmc_step_size": refinement.step_size,
        "mcmc_step_size_learnable": refinement.learnable,
        "mcmc_step_size_lr_multiplier": refinement.learning_rate_multiplier,
        "randomize_mcmc_step_size_scale": refinement.step_size_random_factor,
        "langevin_dynamics_noise": refinement.noise,
        "truncate_mcmc": refinement.graph == "truncate",
        "no_mcmc_detach": refinement.graph in ("full", "truncate"),
        "clamp_futures_grad": refinement.change_clamp is not None,
        "clamp_futures_grad_max_change": refinement.change_clamp or 9.0,
        "absolute_clamp": refinement.state_clamp or 0.0,
        "peak_learning_rate": optimizer.learning_rate,
        "beta1": optimizer.beta1,
        "beta2": optimizer.beta2,
        "weight_decay": optimizer.weight_decay,
        "gradient_clip_val": optimizer.gradient_clipping,
    }


def config_of(hparams: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Config:
    """The Config of a released run, from its hyper-parameters and the shapes of its state dict."""
    beyond = [
        f"{name} is {hparams[name]!r} (only {value!r})"
        for name, value in ONLY.items()
        if hparams.get(name, value) != value
    ]
    if hparams.get("clamp_futures_grad") and hparams.get("randomize_mcmc_step_size_scale", 1) > 1:
        beyond.append(
            "clamp_futures_grad with randomize_mcmc_step_size_scale (the released bound grows "
            "with the random factor, ours does not)"
        )
    if beyond:
        raise ConfigError("this released run cannot be expressed here: " + "; ".join(beyond))
    text, energy = hparams["modality"] == "NLP", hparams["model_name"] == "ebt"
    if text and energy and not hparams["normalize_initial_condition"]:
        raise ConfigError(
            "normalize_initial_condition is false: text states are embedded through a softmax "
            "here; only true is supported"
        )
    kind = hparams["denoising_initial_condition"] if energy else "random_noise"
    initial = {
        "random_noise": "random_noise",
        "zeros": "zeros",
        "most_recent_embedding": "most_recent",
    }.get(kind)
    if initial is None:
        raise ConfigError(
            f"denoising_initial_condition is {kind!r}: supported are random_noise, zeros, "
            "most_recent_embedding"
        )
    width = hparams["embedding_dim"]
    head = width // hparams["multiheaded_attention_heads"]
    model = {
        "kind": "energy" if energy else "baseline",
        "num_layers": hparams["num_transformer_blocks"],
        "width": width,
        "num_heads": hparams["multiheaded_attention_heads"],
        "conditioning": hparams["ebt_type"] if energy else "default",
        "num_kv_heads": shapes["transformer.layers.0.attention.wk.weight"][0] // head,
        "feed_forward_width": shapes["transformer.layers.0.feed_forward.w1.weight"][0],
    }
    state: dict[str, Any] = {"kind": "vocabulary" if text else "embedding", "initial": initial}
    if text:
        model["vocabulary_size"] = shapes["embeddings.weight"][0]
        state["tie_embedding"] = energy and hparams["vocab_to_embed_uses_prob_dist"]
    else:
        if "encoder_down_projection.weight" not in shapes:
            raise ConfigError(
                "this released video model has no encoder_down_projection: its width is its "
                "encoder's; "
                "only models with a projection of the frames can be expressed here"
            )
        state["dimension"] = shapes["encoder_down_projection.weight"][1]
        if not energy:
            model["output"] = "two_linear"
    optimizer = {
        "learning_rate": hparams["peak_learning_rate"],
        "beta1": hparams["beta1"],
        "beta2": hparams["beta2"],
        "weight_decay": hparams["weight_decay"],
        "gradient_clipping": hparams["gradient_clip_val"],
    }
    sections = {"model": model, "state": state, "optimizer": optimizer}
    if energy:
        sections["refinement"] = _refinement_of(hparams)
    return config_from_dict(sections)


def _refinement_of(hparams: Mapping[str, Any]) -> dict[str, Any]:
    truncated = hparams["truncate_mcmc"]
    random_steps = hparams["randomize_mcmc_num_steps"]
    landscapes = hparams["mcmc_num_steps"]
    if truncated:
        graph = "truncate"
    elif hparams["no_mcmc_detach"]:
        graph = "full"
    else:
        graph = "detach"
    change_clamp = None
    if hparams.get("clamp_futures_grad"):
        change_clamp = hparams.get("clamp_futures_grad_max_change", 9.0)
    return {
        "num_steps": landscapes + random_steps,
        "landscapes": "per_step" if landscapes > 1 else "one",
        "step_size": hparams["mcmc_step_size"],
        "learnable": hparams["mcmc_step_size_learnable"],
        "learning_rate_multiplier": hparams["mcmc_step_size_lr_multiplier"],
        "step_size_random_factor": hparams["randomize_mcmc_step_size_scale"],
        "noise": hparams["langevin_dynamics_noise"],
        "change_clamp": change_clamp,
        "state_clamp": hparams.get("absolute_clamp") or None,
        "graph": graph,
        "loss": "last" if truncated else "every",
    }
