"""Conversions give back what they were given, run -> folder -> run; a received folder runs nothing;
what they should refuse, they do. The released layout: test_released_layout.py.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from released_cases import GOLDEN, ROOT, SILENT, golden
from safetensors.torch import load_file
from training_runs import TINY

import ebwm_scale
from ebwm_scale import think
from ebwm_scale.checkpoint import comparison, convert_released
from ebwm_scale.checkpoint import convert as conversion
from ebwm_scale.checkpoint.model_folder import ModelFolder
from ebwm_scale.config.load import load_config
from ebwm_scale.core.errors import CheckpointError, ConfigError, UserError
from ebwm_scale.core.tensor_files import TensorFile, TensorWriter


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
        "checkpoint.remote": "s3://somebody/else",
        "deepspeed.raw": {"compile": {"backend": "other.peoples.module"}},
        "logging.wandb": "online",
        "evaluation.sets": [{"name": "code", "manifest": "/home/other/code.json"}],
        "evaluation.tasks": ["theirs"],
        "evaluation.tasks_path": "/home/other/tasks",
        "checkpoint.best": {"metric": "sets/code/loss"},
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
