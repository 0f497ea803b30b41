"""Conversions give back what they were given: run -> folder -> run, released layout -> folder ->
released layout; and refuse what they should.
"""

import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_runs import TINY

import ebwm_scale
from ebwm_scale import think
from ebwm_scale.checkpoint import comparison, convert_released
from ebwm_scale.checkpoint import convert as conversion
from ebwm_scale.checkpoint import released_ebt as released
from ebwm_scale.checkpoint.load import build, expected_shapes
from ebwm_scale.checkpoint.model_folder import ModelFolder, write_model
from ebwm_scale.config.load import config_from_dict, load_config
from ebwm_scale.core.errors import CheckpointError, ConfigError, UserError
from ebwm_scale.core.tensor_files import TensorFile, TensorWriter
from ebwm_scale.evaluation.parity import relative_error
from ebwm_scale.inference.scoring import last_states
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.refinement.noise import NoiseSource

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = sorted((ROOT / "tests" / "golden").glob("*.safetensors"))
SILENT = {"say": lambda _: None}


@pytest.fixture(scope="module")
def whole(runs):
    """A finished run with replay, whose checkpoints of steps 6 and 8 are there."""
    runs.run(
        "whole",
        overrides={
            "refinement.graph": "truncate",
            "refinement.loss": "last",
            "refinement.replay": True,
            "refinement.landscapes": "one",
        },
    )
    return runs.folder / "whole"


@pytest.fixture(scope="module")
def converted(whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "step_6"
    conversion.export_run(whole / "checkpoints" / "step_000006", folder, training=True, **SILENT)
    return folder


def test_a_run_goes_through_a_folder_and_continues_as_if_nothing_had_happened(
    runs, whole, converted
):
    conversion.import_run(converted, runs.folder / "again", **SILENT)
    runs.run(
        "again",
        overrides={
            "refinement.graph": "truncate",
            "refinement.loss": "last",
            "refinement.replay": True,
            "refinement.landscapes": "one",
        },
        flags=("--resume",),
    )
    after = [row for row in runs.rows("whole") if row["step"] > 6]
    assert [row for row in runs.rows("again") if row["step"] > 6] == after and len(after) >= 2
    from training_runs import same

    assert same(runs.state("again"), runs.state("whole")) == []


def test_it_continues_at_another_stage_with_more_processes(runs, converted):
    conversion.import_run(converted, runs.folder / "wider", zero_stage=2, world_size=2, **SILENT)
    overrides = {
        "refinement.graph": "truncate",
        "refinement.loss": "last",
        "refinement.replay": True,
        "refinement.landscapes": "one",
        "deepspeed.zero_stage": 2,
    }
    output = runs.run("wider", overrides=overrides, flags=("--resume",), processes=2)
    assert "resumed at step 6" in output and "number of processes" not in output
    wide, one = runs.losses("wider"), runs.losses("whole")
    for key in wide:
        assert wide[key] == pytest.approx(one[key], rel=1e-5), key


def test_a_folder_without_training_state_starts_a_run_from_its_weights(runs, whole, tmp_path):
    conversion.export_run(whole, tmp_path / "weights", **SILENT)
    conversion.import_run(tmp_path / "weights", tmp_path / "run", **SILENT)
    model, _ = ebwm_scale.load_checkpoint(tmp_path / "run")
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            model.state_dict().values(), ebwm_scale.load_checkpoint(whole)[0].state_dict().values()
        )
    )
    conversion.import_run(tmp_path / "weights", runs.folder / "from_weights", **SILENT)
    overrides = {
        "refinement.graph": "truncate",
        "refinement.loss": "last",
        "refinement.replay": True,
        "refinement.landscapes": "one",
    }
    assert "resumed at step 0" in runs.run("from_weights", overrides=overrides, flags=("--resume",))
    again, first = (
        [row for row in runs.rows(name) if "split" not in row] for name in ("from_weights", "whole")
    )
    assert [row["step"] for row in again] == [row["step"] for row in first] and again[0][
        "loss"
    ] < first[0]["loss"]  # the same batches, from trained weights


def received(converted, folder, changes=None, files=None):
    """A converted folder as somebody else could send it: other settings and files, with fitting
    hashes.
    """
    shutil.copytree(converted, folder)
    values = yaml.safe_load((folder / "config.yaml").read_text())
    for name, value in (changes or {}).items():
        section, _, key = name.partition(".")
        values[section][key] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    for name, content in (files or {}).items():
        (folder / name).write_bytes(content)
    facts = json.loads((folder / "conversion.json").read_text())
    for name in facts["files"]:
        content = (folder / name).read_bytes()
        facts["files"][name] = {
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    (folder / "conversion.json").write_text(json.dumps(facts))
    return folder


def test_an_import_takes_no_setting_that_reaches_beyond_the_folder(converted, tmp_path):
    hostile = {
        "data.manifest": "/home/other/manifest.json",
        "data.stream": [f"pipe:touch {tmp_path}/executed; cat shard.tar"],
        "deepspeed.raw": {"compile": {"backend": "other.peoples.module"}},
        "logging.wandb": "online",
    }
    mixture = {"data.manifest": None, "data.sources": [{"manifest": "/x", "weight": 1.0}]}
    for number, changes in enumerate((hostile, mixture)):
        folder = received(converted, tmp_path / f"received{number}", changes)
        said = []
        run = tmp_path / f"run{number}"
        conversion.import_run(folder, run, say=said.append)
        checkpoint = next((run / "checkpoints").glob("step_*"))
        for path in (run / "config.yaml", checkpoint / "config.yaml"):
            values = load_config(path).to_dict()
            found = {name: values[name.split(".")[0]][name.split(".")[1]] for name in changes}
            assert not any(value not in (None, [], {}, "off") for value in found.values()), found
        for name in changes:
            dropped = [line for line in said if line.startswith(f"dropped {name}, which was ")]
            assert len(dropped) == (changes[name] is not None), (name, said)
    assert not (tmp_path / "executed").exists()
    own = ["data.manifest=/mine/manifest.json", "data.stream=[a.tar]"]
    conversion.import_run(
        tmp_path / "received0", tmp_path / "own", overrides=own, say=lambda _: None
    )
    data = load_config(tmp_path / "own" / "config.yaml").data
    assert (data.manifest, data.stream) == ("/mine/manifest.json", ("a.tar",))


@pytest.mark.parametrize(
    "command",
    [
        ["ebwm_scale/train.py", "--run-dir", "made"],
        ["ebwm_scale/train.py", "--run-dir", "made", "--dry-run"],
        ["-m", "ebwm_scale.doctor"],
        ["-m", "ebwm_scale.launch", "--cluster", "local", "--run-dir", "made"],
        ["-m", "ebwm_scale.cluster.job", "--run-dir", "made"],
    ],
    ids=lambda command: " ".join(word for word in command if word not in ("-m", "made")),
)
def test_a_configuration_alone_runs_no_command(dataset, tmp_path, command):
    config = TINY | {
        "data": {
            "manifest": str(dataset),
            "stream": [f"pipe:touch {tmp_path}/executed; cat nothing.tar"],
        }
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    words = [str(ROOT / word) if word.endswith(".py") else word for word in command]
    done = subprocess.run(
        [sys.executable, *words, "--config", "config.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and "--allow-pipe" in done.stderr, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def pickled(value) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def test_a_received_folder_runs_no_pickle_and_reads_nothing_outside_of_it(converted, tmp_path):
    proof = tmp_path / "executed"
    outside = tmp_path / "outside.safetensors"
    shutil.copyfile(converted / "model.safetensors", outside)
    index = {"weight_map": {name: str(outside) for name in TensorFile(outside).names()}}
    refused = {
        "pickle": ({"training/replay.pt": pickled({"queues": Touch(proof)})}, "refused|unpickling"),
        "state": ({"training/trainer.json": b'{"step": "../../x", "world_size": 1}'}, "step is"),
        "moments": ({"training/weight-00000.safetensors": outside.read_bytes()}, "not listed"),
        "index": ({"model.safetensors.index.json": json.dumps(index).encode()}, "not listed"),
        "tags": (
            {"config.yaml": f"!!python/object/apply:os.system ['touch {proof}']".encode()},
            "config.yaml",
        ),
    }
    for name, (files, message) in refused.items():
        folder = received(converted, tmp_path / name, files=files)
        with pytest.raises(UserError, match=message):
            conversion.import_run(folder, tmp_path / "run", **SILENT)
    for name, entry in (("/etc/hostname", "outside"), ("../outside.safetensors", "outside")):
        folder = received(converted, tmp_path / f"path{len(name)}")
        facts = json.loads((folder / "conversion.json").read_text())
        facts["files"][name] = {"size": 1, "sha256": ""}
        (folder / "conversion.json").write_text(json.dumps(facts))
        with pytest.raises(CheckpointError, match=entry):
            ModelFolder(folder)
    linked = received(converted, tmp_path / "linked")
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match="outside of it"):
        ebwm_scale.load_checkpoint(linked)
    listed = received(converted, tmp_path / "listed")
    facts = json.loads((listed / "conversion.json").read_text())
    (listed / "model.safetensors.index.json").write_text(json.dumps(index))
    del facts["files"]["model.safetensors"]
    content = (listed / "model.safetensors.index.json").read_bytes()
    facts["files"]["model.safetensors.index.json"] = {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (listed / "model.safetensors").unlink()
    (listed / "conversion.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match="outside of it"):
        ebwm_scale.load_checkpoint(listed)
    assert not proof.exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"files": [], "dtype": 1}', '{"files": {"a": 1}, "dtype": "x"}', "[" * 99999],
)
def test_a_malformed_list_of_files_is_one_line(converted, tmp_path, content):
    folder = tmp_path / "folder"
    shutil.copytree(converted, folder)
    (folder / "conversion.json").write_text(content)
    with pytest.raises(CheckpointError, match="no complete converted model") as caught:
        ModelFolder(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_folder_is_the_model_and_needs_no_dataset(whole, converted, dataset, tmp_path, capsys):
    exported = tmp_path / "model"
    conversion.export_run(whole, exported, max_shard_bytes=20_000, **SILENT)
    model, config = ebwm_scale.load_checkpoint(exported)
    expected = ebwm_scale.load_checkpoint(whole)[0].state_dict()
    assert (
        all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
        and not model.training
    )
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1 and set(index["weight_map"]) == set(expected)
    for file in set(index["weight_map"].values()):  # what the library reads is what we wrote
        assert all(
            torch.equal(tensor, expected[name])
            for name, tensor in load_file(exported / file).items()
        )
    text = (exported / "config.yaml").read_text().replace(str(dataset), "/nowhere/manifest.json")
    (exported / "config.yaml").write_text(text)
    facts = json.loads((exported / "conversion.json").read_text())
    from ebwm_scale.core.files import file_sha256

    facts["files"]["config.yaml"] = {
        "size": len(text.encode()),
        "sha256": file_sha256(exported / "config.yaml"),
    }
    (exported / "conversion.json").write_text(json.dumps(facts))
    assert think.main([str(exported), "--prompt", "abc", "--max-new", "3"]) == 0, (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_precisions_are_the_rounded_weights(whole, tmp_path, dtype):
    said = conversion.export_run(whole, tmp_path / dtype, dtype=dtype, **SILENT)
    kind = comparison.DTYPES[dtype]
    expected = ebwm_scale.load_checkpoint(whole)[0].state_dict()
    assert (
        all(
            torch.equal(tensor, expected[name].to(kind))
            for name, tensor in load_file(tmp_path / dtype / "model.safetensors").items()
        )
        and dtype in said
    )
    with pytest.raises(ConfigError, match="float32 weights"):
        conversion.export_run(whole, tmp_path / "never", dtype="bfloat16", training=True, **SILENT)


def test_transformers_reads_the_folder(whole, tmp_path):
    pytest.importorskip("transformers", reason="the package transformers is not installed")
    from transformers import AutoModel

    from ebwm_scale.inference.scoring import last_states
    from ebwm_scale.inference.thinking import ThinkingConfig
    from ebwm_scale.integrations.transformers import EbwmModel

    conversion.export_run(whole, tmp_path / "model", max_shard_bytes=20_000, **SILENT)
    model, config = ebwm_scale.load_checkpoint(tmp_path / "model")
    ids = torch.randint(
        config.model.vocabulary_size, (2, 5), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        expected = last_states(model, ids, ThinkingConfig(seed=config.train.seed))
    for found in (
        EbwmModel.from_pretrained(tmp_path / "model"),
        AutoModel.from_pretrained(tmp_path / "model"),
    ):
        assert torch.equal(found(input_ids=ids).logits, expected)


def golden(path):
    with safe_open(str(path), "pt") as file:
        case = json.loads(file.metadata()["case"])
        return {
            name.removeprefix("state_dict/"): file.get_tensor(name)
            for name in file.keys()
            if name.startswith("state_dict/")
        }, case["hparams"]


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


def lightning(path, weights, hparams):
    torch.save(
        {
            "state_dict": {f"model.{name}": tensor for name, tensor in weights.items()},
            "hyper_parameters": hparams,
        },
        path,
    )
    return path


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


@pytest.mark.parametrize("cut", [3, 2000, -1])
def test_truncated_files_are_named(tmp_path, converted, cut):
    weights, hparams = golden(GOLDEN[0])
    torch.save({"state_dict": weights, "hyper_parameters": hparams}, tmp_path / "in.ckpt")
    (tmp_path / "in.ckpt").write_bytes((tmp_path / "in.ckpt").read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="in.ckpt"):
        convert_released.import_released(tmp_path / "in.ckpt", tmp_path / "folder", **SILENT)
    path = tmp_path / "model.safetensors"
    path.write_bytes((converted / "model.safetensors").read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        file = TensorFile(path)
        [file.read(name) for name in file.names()]
    assert not (tmp_path / "folder").exists()


def test_a_damaged_folder_is_refused(tmp_path, whole):
    conversion.export_run(whole, tmp_path / "model", **SILENT)
    content = bytearray((tmp_path / "model" / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "model" / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="does not match its hash"):
        ebwm_scale.load_checkpoint(tmp_path / "model")
    with pytest.raises(CheckpointError, match="does not match its hash"):
        conversion.import_run(tmp_path / "model", tmp_path / "run", **SILENT)
    assert not (tmp_path / "run").exists()


def test_nothing_is_overwritten_and_a_result_that_differs_is_not_kept(tmp_path, whole, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="nothing is overwritten"):
        conversion.export_run(whole, tmp_path / "there", **SILENT)
    real = TensorWriter.write
    monkeypatch.setattr(
        TensorWriter,
        "write",
        lambda self, name, tensor: real(
            self, name, tensor + 1e-3 if name.endswith("wo.weight") else tensor
        ),
    )
    with pytest.raises(CheckpointError, match="wo.weight differs from its source"):
        conversion.export_run(whole, tmp_path / "new", **SILENT)
    assert not (tmp_path / "new").exists()


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="announced"):
        with TensorWriter(
            tmp_path / "a.safetensors", {"x": (torch.float32, (2,)), "y": (torch.float32, (2,))}
        ) as file:
            file.write("x", torch.ones(2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "layers, width, vocabulary, gigabytes, allowed_gib",
    [(30, 512, 8000, 0.25, 0.12), pytest.param(26, 1536, 32000, 2, 1, marks=pytest.mark.soak)],
)
def test_memory_does_not_grow_with_the_model(
    tmp_path, layers, width, vocabulary, gigabytes, allowed_gib
):
    """A checkpoint written without a model, converted in a process of its own whose peak is
    compared with what it had before.
    """
    config = config_from_dict(
        {
            "model": {
                "num_layers": layers,
                "width": width,
                "num_heads": 16,
                "vocabulary_size": vocabulary,
            },
            "data": {"context_length": 16},
        }
    )
    shapes = expected_shapes(config)
    folder = tmp_path / "checkpoints" / "step_000001"
    folder.mkdir(parents=True)
    facts = {
        "ranges": json.dumps(
            {name: [0, torch.Size(shape).numel()] for name, shape in shapes.items()}
        ),
        "shapes": json.dumps({k: list(v) for k, v in shapes.items()}),
    }
    with TensorWriter(
        folder / "state-00000-of-00001.safetensors",
        {f"weight/{n}": (torch.float32, (torch.Size(s).numel(),)) for n, s in shapes.items()},
        facts,
    ) as file:
        for index, (name, shape) in enumerate(shapes.items()):
            file.write(f"weight/{name}", torch.full((torch.Size(shape).numel(),), float(index)))
    size = (folder / "state-00000-of-00001.safetensors").stat().st_size
    assert size > gigabytes * 1e9
    (folder / "config.yaml").write_text(config.to_yaml())
    (folder / "trainer.json").write_text(
        json.dumps({"version": 2, "step": 1, "updates": 1.0, "world_size": 1})
    )
    from ebwm_scale.core.files import file_sha256

    entries = {
        path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in folder.iterdir()
    }
    (folder / "manifest.json").write_text(json.dumps({"version": 2, "files": entries}))
    script = (
        "import resource, sys; from pathlib import Path; from ebwm_scale.checkpoint import "
        "comparison, convert as conversion; "
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20\n"
        "comparison.FULL_BYTES = 0; before = peak(); "
        "print(conversion.export_run(Path(sys.argv[1]), Path(sys.argv[2]), "
        "max_shard_bytes=int(sys.argv[3]))); print(peak() - before)"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            script,
            str(tmp_path),
            str(tmp_path / "out"),
            str(int(gigabytes * 4e8)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        "equal bit for bit" in done.stdout and float(done.stdout.splitlines()[-1]) < allowed_gib
    ), done.stdout
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) >= 2


def test_the_command_says_what_it_did_and_errors_are_one_line(tmp_path, whole):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=120,
        )

    done = run("export", whole, tmp_path / "model", "--dtype", "float32")
    assert done.returncode == 0 and "equal bit for bit" in done.stdout and "100%" in done.stdout, (
        done.stderr
    )
    done = run("export", tmp_path, tmp_path / "other")
    assert (
        done.returncode == 2
        and "neither a run folder" in done.stderr
        and done.stderr.count("\n") == 1
    )
