"""Small models of every form that thinks, and what training itself would think of a prompt."""

import torch

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.refinement.loop import refine
from ebwm_scale.refinement.noise import EVALUATION_STEP, NoiseSource
from ebwm_scale.refinement.sampling import TrainingNoise
from ebwm_scale.world_model import WorldModel

LENGTH, SEED = 9, 33
TEXT = {"model": {"vocabulary_size": 31}}
VIDEO = {"state": {"kind": "embedding", "dimension": 6}}
CASES = {
    "default": TEXT,
    "anchored": {"model": {"vocabulary_size": 31, "predicted_input": "anchored"}},
    "time_embed": {"model": {"vocabulary_size": 31, "conditioning": "time_embed"}},
    "adaln": {"model": {"vocabulary_size": 31, "conditioning": "adaln"}},
    "predicted_only": {"model": {"vocabulary_size": 31, "conditioning": "predicted_only"}},
    "grouped": {"model": {"vocabulary_size": 31, "num_kv_heads": 2}},
    "qk_norm": {
        "model": {
            "vocabulary_size": 31,
            "num_kv_heads": 2,
            "qk_norm": True,
            "logit_softcap": 0.8,
            "conditioning": "adaln",
        }
    },
    "no own keys": {
        "model": {
            "vocabulary_size": 31,
            "num_kv_heads": 2,
            "qk_norm": True,
            "own_keys": False,
            "conditioning": "adaln",
            "energy_head": ["linear", "direct"],
        }
    },
    "logits": TEXT | {"refinement": {"update": "logits"}},
    "mirror": TEXT | {"refinement": {"update": "mirror"}, "state": {"initial": "zeros"}},
    "heads": {
        "model": {
            "vocabulary_size": 31,
            "conditioning": "adaln",
            "energy_head": ["linear", "quadratic", "bilinear", "context"],
        }
    },
    "shallow": {
        "model": {
            "vocabulary_size": 31,
            "conditioning": "time_embed",
            "predicted_input": "anchored",
            "predicted_layers": 2,
            "energy_head": ["bilinear", "direct", "context"],
        }
    },
    "encoded again": TEXT | {"refinement": {"reencode": "all", "num_steps": 3}},
    "last blocks encoded again": {
        "model": {
            "vocabulary_size": 31,
            "conditioning": "time_embed",
            "predicted_input": "anchored",
            "predicted_layers": 1,
            "energy_head": ["bilinear", "context"],
        },
        "refinement": {"reencode": 2, "num_steps": 3},
    },
    "every other step encoded again": TEXT
    | {"refinement": {"reencode": "all", "reencode_every": 2, "num_steps": 4}},
    "looped": {
        "model": {
            "vocabulary_size": 31,
            "loops": 3,
            "predicted_input": "anchored",
            "predicted_layers": 2,
            "energy_head": ["direct", "context"],
        }
    },
    "looped, adaln, all layers": {
        "model": {"vocabulary_size": 31, "loops": 2, "conditioning": "adaln"},
    },
    "looped, time_embed": {
        "model": {
            "vocabulary_size": 31,
            "loops": 2,
            "conditioning": "time_embed",
            "own_keys": False,
            "predicted_layers": 1,
        },
    },
    "looped, encoded again": {
        "model": {"vocabulary_size": 31, "loops": 2},
        "refinement": {"reencode": 2, "num_steps": 3},
    },
    "workspace": {
        "model": {"vocabulary_size": 31, "energy_head": ["bilinear", "context"]},
        "state": {"workspace": 5, "workspace_initial": "random_noise"},
        "refinement": {"num_steps": 3},
    },
    "workspace, encoded again": {
        "model": {"vocabulary_size": 31, "energy_head": ["bilinear", "context"]},
        "state": {"workspace": 5},
        "refinement": {"reencode": "all", "num_steps": 3},
    },
    "decay": TEXT | {"refinement": {"update": "mirror", "decay": 0.3, "num_steps": 3}},
    "decay of logits": TEXT | {"refinement": {"update": "logits", "decay": 0.3, "num_steps": 3}},
    "workspace, decay": {
        "model": {"vocabulary_size": 31, "energy_head": ["bilinear"]},
        "state": {"workspace": 5, "initial": "zeros"},
        "refinement": {"num_steps": 3, "decay": 0.3, "update": "mirror"},
    },
    "damping": TEXT | {"refinement": {"damping": 1.0, "num_steps": 3}},
    "damping_after": TEXT | {"refinement": {"damping": 2.0, "damping_after": 2, "num_steps": 4}},
    "workspace, damping, decay": {
        "model": {"vocabulary_size": 31, "energy_head": ["bilinear"]},
        "state": {"workspace": 5},
        "refinement": {"num_steps": 3, "decay": 0.3, "damping": 0.5, "update": "mirror"},
    },
    "momentum": TEXT | {"refinement": {"momentum": 0.7, "num_steps": 4}},
    "momentum of logits, damping": TEXT
    | {"refinement": {"momentum": 0.7, "update": "logits", "damping": 0.5, "num_steps": 4}},
    "workspace, momentum, decay, encoded again": {
        "model": {"vocabulary_size": 31, "energy_head": ["bilinear"]},
        "state": {"workspace": 5, "initial": "zeros"},
        "refinement": {
            "num_steps": 4,
            "momentum": 0.7,
            "decay": 0.3,
            "update": "mirror",
            "reencode": "all",
        },
    },
    "candidates, momentum": TEXT
    | {"refinement": {"candidates": 5, "num_steps": 4, "update": "mirror", "momentum": 0.7}},
    "candidates": TEXT
    | {
        "refinement": {"candidates": 5, "num_steps": 3, "update": "mirror"},
        "state": {"initial": "zeros"},
    },
    "candidates, damping": TEXT
    | {
        "refinement": {"candidates": 5, "num_steps": 3, "update": "mirror", "damping": 1.0},
        "state": {"initial": "zeros"},
    },
    "candidates, logits": TEXT
    | {"refinement": {"candidates": 5, "num_steps": 3, "update": "logits"}},
    "candidates, workspace, encoded again": {
        "model": {"vocabulary_size": 31, "energy_head": ["bilinear", "context"]},
        "state": {"workspace": 5},
        "refinement": {"candidates": 5, "reencode": "all", "num_steps": 3},
    },
    "video": VIDEO,
    "video, decay": VIDEO | {"refinement": {"decay": 0.3, "num_steps": 3}},
    "video, momentum": VIDEO | {"refinement": {"momentum": 0.7, "num_steps": 4}},
    "video, encoded again": VIDEO | {"refinement": {"reencode": 1}},
    "video, looped": VIDEO | {"model": {"loops": 3, "predicted_input": "anchored"}},
    "video, shallow": VIDEO
    | {
        "model": {
            "conditioning": "predicted_only",
            "predicted_input": "anchored",
            "predicted_layers": 1,
            "energy_head": ["linear", "context"],
        }
    },
    "video, most recent": {
        "state": {"kind": "embedding", "dimension": 6, "initial": "most_recent"},
        "model": {"predicted_input": "anchored"},
    },
    "video, time_embed": VIDEO | {"model": {"conditioning": "time_embed"}},
}


def model_of(case, **changes):
    torch.manual_seed(0)
    sections = {
        "model": {"num_layers": 3, "width": 32, "num_heads": 4},
        "refinement": {"step_size": 3.0},
        "data": {"context_length": LENGTH},
        "train": {"seed": SEED},
    }
    for section, values in {**case, **changes}.items():
        sections[section] = sections.get(section, {}) | values
    model = WorldModel(config_from_dict(sections)).double().eval()
    for p in model.parameters():  # away from zeros and ones, so that nothing is equal by accident
        p.data += 0.05 * torch.randn_like(p) if p.ndim > 1 else 0
    for name, p in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            p.data += 0.2 * torch.randn_like(p)
    return model


def prompt_of(model, length, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if model.config.state.kind == "vocabulary":
        return torch.randint(31, (length,), generator=generator)
    return torch.randn(length, 6, generator=generator, dtype=torch.float64)


def uncached(model, prompt, sample_id=0, num_steps=None):
    """The last position's state by training's own refinement loop over the whole prompt."""
    config, embedded = model.config.refinement, model.embed_observed(prompt[None])
    draws = TrainingNoise(
        NoiseSource(SEED, EVALUATION_STEP),
        config,
        torch.tensor([sample_id]),
        (1, len(prompt), model.state_size),
        randomize=False,
        kind=model.config.state.initial,
        dtype=torch.float64,
        last_observed=prompt[None] if model.config.state.kind == "embedding" else None,
        workspace=model.config.state.workspace,
        workspace_kind=model.config.state.workspace_initial,
    )
    return refine(
        model,
        embedded,
        None,
        config=config,
        landscapes=model.landscapes(num_steps or config.num_steps),
        noise=draws,
        training=False,
        keep_state=torch.float64,
    ).state[0, -1]
