"""The released video baseline and ours are the same function, whichever way one is converted."""

import pytest
import torch
from released_cases import SILENT, lightning

from ebwm_scale.checkpoint import convert_released
from ebwm_scale.checkpoint import released_ebt as released
from ebwm_scale.checkpoint.load import build, expected_shapes
from ebwm_scale.checkpoint.model_folder import ModelFolder, write_model
from ebwm_scale.config.load import config_from_dict, load_config
from ebwm_scale.core.errors import UserError
from ebwm_scale.evaluation.parity import relative_error
from ebwm_scale.refinement.noise import NoiseSource

VIDEO_BASELINE = {
    "modality": "VID",
    "model_name": "baseline_transformer",
    "embedding_dim": 24,
    "num_transformer_blocks": 2,
    "multiheaded_attention_heads": 2,
    "peak_learning_rate": 0.0004,
    "beta1": 0.9,
    "beta2": 0.999,
    "weight_decay": 0.01,
    "gradient_clip_val": 1.0,
    "context_length": 8,
}


def video_baseline_weights(width=24, hidden=36, dimension=40, layers=2):
    """A state dict of the released video baseline: frame projection, blocks, D x D output,
    up-projection.
    """
    generator = torch.Generator().manual_seed(3)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = {
        "encoder_down_projection.weight": normal(width, dimension, scale=dimension**-0.5),
        "encoder_down_projection.bias": normal(width, scale=0.1),
        "encoder_up_projection.weight": normal(dimension, width, scale=width**-0.5),
        "encoder_up_projection.bias": normal(dimension, scale=0.1),
        "output.weight": normal(width, width, scale=width**-0.5),
        "transformer.norm.weight": 1 + normal(width, scale=0.1),
    }
    for layer in range(layers):
        prefix = f"transformer.layers.{layer}."
        for name in ("wq", "wk", "wv", "wo"):
            weights[f"{prefix}attention.{name}.weight"] = normal(width, width, scale=width**-0.5)
        weights[f"{prefix}feed_forward.w1.weight"] = normal(hidden, width, scale=width**-0.5)
        weights[f"{prefix}feed_forward.w2.weight"] = normal(width, hidden, scale=hidden**-0.5)
        weights[f"{prefix}feed_forward.w3.weight"] = normal(hidden, width, scale=width**-0.5)
        weights[f"{prefix}attention_norm.weight"] = 1 + normal(width, scale=0.1)
        weights[f"{prefix}ffn_norm.weight"] = 1 + normal(width, scale=0.1)
    return weights


def plain_video_baseline(weights, frames, *, heads=2, layers=2):
    """The released video baseline written out in plain PyTorch: frames (B, S, dimension) to
    predictions of the next.
    """

    def norm(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weights[name]

    def rotated(x):  # adjacent pairs as complex numbers
        positions, half = x.shape[1], x.shape[-1] // 2
        rates = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(positions, dtype=torch.float64)[:, None] * rates
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], half, 2))
        turned = pairs * torch.polar(torch.ones_like(angles), angles)[None, :, None]
        return torch.view_as_real(turned).flatten(-2)

    x = (
        frames @ weights["encoder_down_projection.weight"].T
        + weights["encoder_down_projection.bias"]
    )
    batch, positions, width = x.shape
    allowed = torch.ones(positions, positions, dtype=torch.bool).tril()
    for layer in range(layers):
        prefix = f"transformer.layers.{layer}."
        rows = norm(x, f"{prefix}attention_norm.weight")
        queries, keys, values = (
            (rows @ weights[f"{prefix}attention.{name}.weight"].T).view(
                batch, positions, heads, width // heads
            )
            for name in ("wq", "wk", "wv")
        )
        queries, keys = rotated(queries), rotated(keys)
        scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) / (width // heads) ** 0.5
        shares = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", shares, values).reshape(batch, positions, width)
        x = x + mixed @ weights[f"{prefix}attention.wo.weight"].T
        rows = norm(x, f"{prefix}ffn_norm.weight")
        gate = rows @ weights[f"{prefix}feed_forward.w1.weight"].T
        up = rows @ weights[f"{prefix}feed_forward.w3.weight"].T
        gated = gate * gate.sigmoid() * up
        x = x + gated @ weights[f"{prefix}feed_forward.w2.weight"].T
    hidden = norm(x, "transformer.norm.weight") @ weights["output.weight"].T
    return (
        hidden @ weights["encoder_up_projection.weight"].T + weights["encoder_up_projection.bias"]
    )


def test_a_released_video_baseline_predicts_what_it_did_and_goes_back_bitwise(tmp_path):
    weights = video_baseline_weights()
    encoder = {"image_encoder.conv.weight": torch.ones(3), "image_encoder.bias": torch.ones(1)}
    said = []
    file = lightning(tmp_path / "in.ckpt", weights | encoder, VIDEO_BASELINE)
    convert_released.import_released(file, tmp_path / "folder", dtype="float64", say=said.append)
    assert any("2 tensors of the frozen image encoder" in line for line in said)
    folder = ModelFolder(tmp_path / "folder")
    config = load_config(tmp_path / "folder" / "config.yaml")
    model = build(config, {name: folder.read(name) for name in folder.files}).train()
    generator = torch.Generator().manual_seed(5)
    sequence = torch.randn(3, 9, 40, generator=generator, dtype=torch.float64)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    expected = plain_video_baseline(leaves, sequence[:, :-1])
    prediction = model.output(model.network(model.embed_observed(sequence[:, :-1])))
    assert relative_error(prediction, expected.detach()) < 1e-10
    loss = torch.nn.functional.smooth_l1_loss(expected, sequence[:, 1:])
    loss.backward()
    gradients = released.to_ours({name: leaf.grad for name, leaf in leaves.items()})
    output = model(
        sequence[:, :-1], sequence[:, 1:], sample_ids=torch.arange(3), source=NoiseSource(0, 0)
    )
    assert relative_error(output.loss, loss.detach()) < 1e-10
    output.loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == gradients.keys()
    for name in gradients:
        assert relative_error(found[name], gradients[name]) < 1e-10, name
    convert_released.export_released(tmp_path / "folder", tmp_path / "out.ckpt", **SILENT)
    again, hparams = convert_released.read_released(tmp_path / "out.ckpt")
    assert again.keys() == weights.keys() and hparams["modality"] == "VID"
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert released.config_of(hparams, shapes) == released.config_of(VIDEO_BASELINE, shapes)


def test_our_video_baseline_is_exported_as_the_same_function_in_the_released_layout(tmp_path):
    config = config_from_dict(
        {
            "model": {"kind": "baseline", "num_layers": 2, "width": 24, "num_heads": 2},
            "state": {"kind": "embedding", "dimension": 40},
            "data": {"context_length": 8},
        }
    )
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * 0.2
        for name, shape in expected_shapes(config).items()
    }
    write_model(
        tmp_path / "ours",
        config,
        expected_shapes(config),
        weights.__getitem__,
        dtype=torch.float64,
        source={},
        manifest=None,
        max_shard_bytes=10**9,
    )
    convert_released.export_released(tmp_path / "ours", tmp_path / "out.ckpt", **SILENT)
    released_weights, _ = convert_released.read_released(tmp_path / "out.ckpt")
    frames = torch.randn(2, 8, 40, generator=generator, dtype=torch.float64)
    model = build(config, weights)
    with torch.no_grad():
        ours = model.output(model.network(model.embed_observed(frames)))
    assert relative_error(ours, plain_video_baseline(released_weights, frames)) < 1e-10


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight_tie_vae_proj": True}, "weight_tie_vae_proj is True"),
        ("encoder_down_projection", "no encoder_down_projection: its width is its encoder's"),
        ("encoder_up_projection", "output.hidden.weight|output.up.weight .* is missing"),
    ],
)
def test_other_forms_of_the_released_video_baseline_are_refused_in_words(tmp_path, change, message):
    weights, hparams = video_baseline_weights(), dict(VIDEO_BASELINE)
    if isinstance(change, dict):
        hparams |= change
    else:
        weights = {name: tensor for name, tensor in weights.items() if change not in name}
    with pytest.raises(UserError, match=message):
        convert_released.import_released(
            lightning(tmp_path / "in.ckpt", weights, hparams), tmp_path / "folder", **SILENT
        )
