"""Conversions give back what they were given: run -> folder -> run, released layout -> folder -> released layout; and refuse what they should."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ebwm_scale
from ebwm_scale import conversion, released, think
from ebwm_scale.config import config_from_dict
from ebwm_scale.consolidated import ModelFolder
from ebwm_scale.errors import CheckpointError, ConfigError, UserError
from ebwm_scale.loading import expected_shapes
from ebwm_scale.tensor_files import TensorFile, TensorWriter

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
    from ebwm_scale.data.manifest import file_sha256

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
    kind = conversion.DTYPES[dtype]
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
    from ebwm_scale.transformers_model import EbwmModel

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
    said = conversion.import_released(
        tmp_path / "in.ckpt", tmp_path / "folder", dtype="float64", **SILENT
    )
    assert "equal bit for bit" in said and "gradients on a fixed batch equal" in said
    conversion.export_released(tmp_path / "folder", tmp_path / "out.ckpt", **SILENT)
    again, written = conversion.read_released(tmp_path / "out.ckpt")
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
    conversion.import_released(
        tmp_path / "bare.safetensors",
        tmp_path / "bare",
        hparams=tmp_path / "h.json",
        dtype="float64",
        **SILENT,
    )
    left, right = ModelFolder(tmp_path / "bare"), ModelFolder(tmp_path / "folder")
    assert all(torch.equal(left.read(name), right.read(name)) for name in left.files)


def test_what_the_released_code_cannot_express_is_listed(tmp_path):
    config = config_from_dict(
        {
            "model": {
                "num_layers": 1,
                "width": 16,
                "num_heads": 1,
                "vocabulary_size": 9,
                "predicted_input": "anchored",
            },
            "refinement": {"update": "mirror"},
            "state": {"map_scale": 3.0},
        }
    )
    with pytest.raises(ConfigError) as caught:
        released.hparams_of(config)
    assert all(
        words in str(caught.value)
        for words in (
            "model.predicted_input is 'anchored'",
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
            conversion.import_released(tmp_path / name, tmp_path / "folder", **SILENT)
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
        conversion.import_released(tmp_path / "in.ckpt", tmp_path / "folder", **SILENT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.ckpt"]


@pytest.mark.parametrize("cut", [3, 2000, -1])
def test_truncated_files_are_named(tmp_path, converted, cut):
    weights, hparams = golden(GOLDEN[0])
    torch.save({"state_dict": weights, "hyper_parameters": hparams}, tmp_path / "in.ckpt")
    (tmp_path / "in.ckpt").write_bytes((tmp_path / "in.ckpt").read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="in.ckpt"):
        conversion.import_released(tmp_path / "in.ckpt", tmp_path / "folder", **SILENT)
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
    """A checkpoint written without a model, converted in a process of its own whose peak is compared with what it had before."""
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
    from ebwm_scale.data.manifest import file_sha256

    entries = {
        path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in folder.iterdir()
    }
    (folder / "manifest.json").write_text(json.dumps({"version": 2, "files": entries}))
    script = (
        "import resource, sys; from pathlib import Path; from ebwm_scale import conversion; peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20\n"
        "conversion.FULL_BYTES = 0; before = peak(); print(conversion.export_run(Path(sys.argv[1]), Path(sys.argv[2]), max_shard_bytes=int(sys.argv[3]))); print(peak() - before)"
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
