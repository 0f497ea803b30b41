"""The released EBT layout goes through ours and comes back bit for bit; what does not fit, and what
carries code, is refused in words.
"""

import json
import os
import pickle

import pytest
import torch
from released_cases import GOLDEN, ROOT, SILENT, golden, lightning
from safetensors.torch import save_file

from ebwm_scale.checkpoint import convert_released
from ebwm_scale.checkpoint import released_ebt as released
from ebwm_scale.checkpoint.load import build
from ebwm_scale.checkpoint.model_folder import ModelFolder
from ebwm_scale.config.load import config_from_dict, load_config
from ebwm_scale.core.errors import CheckpointError, ConfigError, UserError
from ebwm_scale.inference.scoring import last_states
from ebwm_scale.inference.thinking import ThinkingConfig


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_released_layout_goes_through_ours_and_comes_back_bitwise(path, tmp_path):
    weights, hparams = golden(path)
    torch.save(
        {
            "state_dict": {f"model.{name}": tensor for name, tensor in weights.items()},
            "hyper_parameters": hparams,
        },
        tmp_path / "in.ckpt",
    )
    said = convert_released.import_released(
        tmp_path / "in.ckpt", tmp_path / "folder", dtype="float64", **SILENT
    )
    assert "equal bit for bit" in said and "gradients on a fixed batch equal" in said
    convert_released.export_released(tmp_path / "folder", tmp_path / "out.ckpt", **SILENT)
    again, written = convert_released.read_released(tmp_path / "out.ckpt")
    settings = released.SETTINGS
    assert {n for n in again if n not in settings} == {n for n in weights if n not in settings}
    assert all(
        torch.equal(tensor, again[name]) and tensor.shape == again[name].shape
        for name, tensor in weights.items()
        if name not in settings
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert released.config_of(written, shapes) == released.config_of(hparams, shapes)
    # the bare state dict, and as safetensors
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        tmp_path / "bare.safetensors",
    )
    (tmp_path / "h.json").write_text(json.dumps(hparams))
    convert_released.import_released(
        tmp_path / "bare.safetensors",
        tmp_path / "bare",
        hparams=tmp_path / "h.json",
        dtype="float64",
        **SILENT,
    )
    left, right = ModelFolder(tmp_path / "bare"), ModelFolder(tmp_path / "folder")
    assert all(torch.equal(left.read(name), right.read(name)) for name in left.files)


@pytest.mark.parametrize("case", ["nlp_default_a5", "vid_default"])
@pytest.mark.parametrize("alpha", [1e-6, 0.0, -3.0])
def test_a_learned_alpha_below_its_clamp_is_kept_and_predictions_use_the_clamp(
    tmp_path, case, alpha
):
    weights, hparams = golden(ROOT / "tests" / "golden" / f"{case}.safetensors")
    predictions = {}
    for value in (alpha, 1e-4):
        changed = weights | {"alpha": torch.tensor(value, dtype=torch.float64)}
        folder = tmp_path / f"{value}"
        file = lightning(tmp_path / f"{value}.ckpt", changed, hparams)
        convert_released.import_released(file, folder, dtype="float64", **SILENT)
        assert ModelFolder(folder).read("step_size").item() == value
        convert_released.export_released(folder, tmp_path / f"{value}_again.ckpt", **SILENT)
        again, _ = convert_released.read_released(tmp_path / f"{value}_again.ckpt")
        assert again["alpha"].item() == value
        config = load_config(folder / "config.yaml")
        model = build(config, ours_of(folder)).eval()
        observed = torch.zeros(2, 5, dtype=torch.int64)
        if config.state.kind == "embedding":
            observed = torch.zeros(2, 5, config.state.dimension, dtype=torch.float64)
        with torch.no_grad():
            predictions[value] = last_states(model, observed, ThinkingConfig(seed=1))
    assert torch.equal(predictions[alpha], predictions[1e-4])


def ours_of(folder):
    source = ModelFolder(folder)
    return {name: source.read(name) for name in source.files}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    weights, hparams = golden(ROOT / "tests" / "golden" / "vid_default.safetensors")
    weights["alpha"] = torch.tensor(value)
    with pytest.raises(CheckpointError, match="not finite in alpha") as caught:
        convert_released.import_released(
            lightning(tmp_path / "in.ckpt", weights, hparams), tmp_path / "folder", **SILENT
        )
    assert "\n" not in str(caught.value)


def test_what_the_released_code_cannot_express_is_listed(tmp_path):
    config = config_from_dict(
        {
            "model": {
                "num_layers": 1,
                "width": 16,
                "num_heads": 1,
                "vocabulary_size": 9,
                "predicted_input": "anchored",
                "energy_head": ["linear", "context"],
            },
            "refinement": {"update": "mirror", "loss_weights": "rising", "reencode": 1},
            "state": {"map_scale": 3.0, "workspace": 4},
        }
    )
    with pytest.raises(ConfigError) as caught:
        released.hparams_of(config)
    assert all(
        words in str(caught.value)
        for words in (
            "model.predicted_input is 'anchored'",
            "model.energy_head is ['linear', 'context']",
            "refinement.loss_weights is 'rising'",
            "refinement.reencode is 1",
            "state.workspace is 4",
            "refinement.update is 'mirror'",
            "state.map_scale is 3.0",
        )
    )


def test_released_clamps_are_ours_and_what_has_no_counterpart_is_refused():
    weights, hparams = golden(ROOT / "tests" / "golden" / "nlp_default_a5.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    clamped = released.config_of(
        hparams
        | {"clamp_futures_grad": True, "clamp_futures_grad_max_change": 4.0, "absolute_clamp": 7.0},
        shapes,
    )
    assert (clamped.refinement.change_clamp, clamped.refinement.state_clamp) == (4.0, 7.0)
    assert released.config_of(released.hparams_of(clamped), shapes) == clamped
    free = released.config_of(
        hparams
        | {
            "clamp_futures_grad": False,
            "clamp_futures_grad_max_change": 4.0,
            "absolute_clamp": 0.0,
        },
        shapes,
    )
    assert (free.refinement.change_clamp, free.refinement.state_clamp) == (None, None)
    with pytest.raises(ConfigError) as caught:
        released.config_of(
            hparams
            | {
                "sharpen_predicted_distribution": 0.5,
                "ebt_norm": "dyt",
                "clamp_futures_grad": True,
                "randomize_mcmc_step_size_scale": 2.0,
            },
            shapes,
        )
    assert all(
        words in str(caught.value)
        for words in (
            "sharpen_predicted_distribution is 0.5",
            "ebt_norm is 'dyt'",
            "clamp_futures_grad with randomize",
        )
    )


class Malicious:
    def __reduce__(self):
        return (os.system, (f"touch {Malicious.proof}",))


def test_a_pickle_that_carries_code_is_refused_and_does_not_run(tmp_path):
    Malicious.proof = tmp_path / "executed"
    weights, hparams = golden(GOLDEN[0])
    torch.save(
        {"state_dict": weights, "hyper_parameters": hparams, "callbacks": Malicious()},
        tmp_path / "bad.ckpt",
    )
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Malicious()))
    for name in ("bad.ckpt", "plain.ckpt"):
        with pytest.raises(CheckpointError, match="refused|no PyTorch file"):
            convert_released.import_released(tmp_path / name, tmp_path / "folder", **SILENT)
        assert not Malicious.proof.exists() and not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda c: {**c, "state_dict": {**c["state_dict"], "model.strange": torch.ones(2)}},
            "strange: not a parameter",
        ),
        (
            lambda c: {
                **c,
                "state_dict": {k: v for k, v in c["state_dict"].items() if "wq" not in k},
            },
            "network.layers.0.attention.wq.weight .* is missing",
        ),
        (
            lambda c: {
                **c,
                "state_dict": {
                    k: v[:-1] if k.endswith("wo.weight") else v for k, v in c["state_dict"].items()
                },
            },
            "has shape",
        ),
        (lambda c: {"state_dict": c["state_dict"]}, "without hyper-parameters"),
        (lambda c: [1], "holds a list"),
        (lambda c: {"state_dict": {"a": 1}}, "no state dict"),
        (
            lambda c: {
                **c,
                "hyper_parameters": {
                    k: v for k, v in c["hyper_parameters"].items() if k != "embedding_dim"
                },
            },
            "lack 'embedding_dim'",
        ),
    ],
)
def test_what_does_not_fit_is_listed_and_nothing_is_written(tmp_path, damage, message):
    weights, hparams = golden(GOLDEN[0])
    torch.save(
        damage(
            {
                "state_dict": {f"model.{name}": tensor for name, tensor in weights.items()},
                "hyper_parameters": hparams,
            }
        ),
        tmp_path / "in.ckpt",
    )
    with pytest.raises(UserError, match=message):
        convert_released.import_released(tmp_path / "in.ckpt", tmp_path / "folder", **SILENT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.ckpt"]
