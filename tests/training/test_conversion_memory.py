"""A conversion holds a few tensors at a time, and leaves nothing of what it could not finish."""

import json
import subprocess
import sys

import pytest
import torch

from ebwm_scale.checkpoint.load import expected_shapes
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.tensor_files import TensorWriter


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
