"""Whoever opens a dataset, or a run by its dataset, compares the tokenizer with the manifest."""

import argparse
import ast
import shutil
from pathlib import Path

import pytest

import ebwm_scale
from ebwm_scale import doctor
from ebwm_scale.checkpoint.convert import dataset_of
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import ConfigError, DataError
from ebwm_scale.core.files import file_sha256
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.format.side_files import open_manifest
from ebwm_scale.data.format.verify import verify_dataset
from ebwm_scale.data.loading.mixture import open_sources
from ebwm_scale.data.prepare.text import make_text_dataset
from ebwm_scale.data.prepare.tokenizer import train_tokenizer
from ebwm_scale.data.tokenizer import open_tokenizer
from ebwm_scale.think import manifest_of
from ebwm_scale.training.preflight import fill_from_data


@pytest.fixture(scope="module")
def other_tokenizer(corpus, tmp_path_factory):
    """A sound tokenizer of the same size that was trained on other documents."""
    path = tmp_path_factory.mktemp("other") / "tokenizer.model"
    train_tokenizer([corpus / "deep"], path, 320, seed=1)
    return path


def config_of(manifest):
    return config_from_dict(
        {
            "model": {"vocabulary_size": 320},
            "data": {"manifest": str(manifest), "context_length": 16},
        }
    )


def asked_by_doctor(manifest):
    report = doctor.Report()
    doctor.check_training(report, config_of(manifest), manifest.parent / "run")
    missing = [text for verdict, _, text in report.lines if verdict == "MISSING"]
    if missing:
        raise DataError(missing[0])


OPENERS = {
    "a dataset": open_manifest,
    "training": lambda manifest: open_split(manifest, "train", verify="sizes"),
    "evaluation, mixtures": lambda m: open_sources([(m, 1), (m, 2)], "validation", verify="sizes"),
    "doctor": asked_by_doctor,
    "think, questions, harness": lambda manifest: manifest_of(
        argparse.Namespace(data=None, checkpoint="run"), config_of(manifest)
    ),
    "the same with --data": lambda manifest: manifest_of(
        argparse.Namespace(data=str(manifest), checkpoint="run"), config_of("elsewhere")
    ),
    "export": lambda manifest: dataset_of(config_of(manifest), manifest, print),
}


@pytest.mark.parametrize("name", OPENERS)
def test_another_tokenizer_is_refused_by_whoever_opens(dataset, other_tokenizer, name):
    OPENERS[name](dataset)
    shutil.copyfile(other_tokenizer, dataset.parent / "tokenizer.model")
    assert open_tokenizer(dataset.parent / "tokenizer.model").vocabulary_size == 320
    with pytest.raises(
        DataError, match="tokenizer.model: sha256 is .*, the manifest says"
    ) as error:
        OPENERS[name](dataset)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", OPENERS)
def test_a_missing_tokenizer_is_refused_by_whoever_opens(dataset, name):
    (dataset.parent / "tokenizer.model").unlink()
    with pytest.raises(DataError, match="tokenizer.model: is missing"):
        OPENERS[name](dataset)


def test_a_run_refuses_a_dataset_made_again_with_another_tokenizer(
    dataset, corpus, other_tokenizer, tmp_path
):
    run = fill_from_data(config_of(dataset), open_manifest(dataset))
    assert run.data.tokenizer_sha256 == file_sha256(dataset.parent / "tokenizer.model")
    again = make_text_dataset(
        [corpus], tmp_path / "again", tokenizer=other_tokenizer, context_length=16, report=str
    )
    options = argparse.Namespace(data=str(again), checkpoint="run")
    for use in (
        lambda: manifest_of(options, run),
        lambda: dataset_of(run, again, print),
        lambda: fill_from_data(run, open_manifest(again)),
    ):
        with pytest.raises(DataError, match="the run was trained with") as error:
            use()
        assert "\n" not in str(error.value)
    options.data = str(dataset)
    assert manifest_of(options, run).path == dataset
    older = config_of(dataset)  # of a run that does not know its tokenizer
    assert fill_from_data(older, open_manifest(again)).data.tokenizer_sha256 is not None


def test_a_run_that_masks_documents_takes_the_token_between_them_from_its_data(dataset):
    manifest = open_manifest(dataset)
    config = config_of(dataset)
    assert fill_from_data(config, manifest).data.eos_id is None
    masked = config.replace(data=config.data.replace(mask_documents=True))
    filled = fill_from_data(masked, manifest)
    assert filled.data.eos_id == manifest.content.eos_id
    assert fill_from_data(filled, manifest).data.eos_id == manifest.content.eos_id
    another = filled.replace(data=filled.data.replace(eos_id=manifest.content.eos_id + 1))
    with pytest.raises(
        ConfigError, match="data.eos_id is .*, the dataset .* has .*; leave the key"
    ):
        fill_from_data(another, manifest)


def test_an_export_without_a_named_dataset_warns_and_carries_none(dataset, other_tokenizer):
    shutil.copyfile(other_tokenizer, dataset.parent / "tokenizer.model")
    said = []
    assert dataset_of(config_of(dataset), None, said.append) is None
    assert "without tokenizer or encoder" in said[0] and "sha256" in said[0]


def test_another_tokenizer_in_a_folder_for_transformers_is_refused(dataset, other_tokenizer):
    pytest.importorskip("transformers", reason="the package transformers is not installed")
    from ebwm_scale.integrations.transformers import EbwmModel

    (dataset.parent.parent / "converted").mkdir()
    folder = dataset.parent.rename(dataset.parent.parent / "converted" / "data").parent
    with pytest.raises(OSError):  # no weights there: past the comparison
        EbwmModel.from_pretrained(folder)
    shutil.copyfile(other_tokenizer, folder / "data" / "tokenizer.model")
    with pytest.raises(DataError, match="tokenizer.model: sha256"):
        EbwmModel.from_pretrained(folder)


def test_verification_names_another_tokenizer(dataset, other_tokenizer):
    shutil.copyfile(other_tokenizer, dataset.parent / "tokenizer.model")
    assert "damaged or another one" in verify_dataset(dataset)[0][0]


READ_THE_MANIFEST_ALONE = {
    "data/format/side_files.py": "opens",
    "data/format/repair.py": "refuses what cannot be repaired in its own words",
    "data/format/verify.py": "lists every problem instead of raising the first",
    "data/format/manifest.py": "looks whether a dataset is there already",
    "data/prepare/text.py": "has just written it",
    "data/prepare/video.py": "has just written it",
    "data/prepare/worlds/dataset.py": "has just written it, or takes the encoder of --like",
    "plan.py": "takes sizes only",
}


def test_nobody_else_reads_a_manifest_without_comparing():
    package = Path(ebwm_scale.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            if is_call and node.func.id == "load_manifest":
                found.add(path.relative_to(package).as_posix())
    assert found <= set(READ_THE_MANIFEST_ALONE), found
