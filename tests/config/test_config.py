"""Configuration: typed, all errors at once, the nearest key named, overrides win, and what is saved
reads back the same.
"""

from pathlib import Path

import pytest
import yaml

from ebwm_scale.config.checks import batch_arithmetic
from ebwm_scale.config.load import config_from_dict, load_config
from ebwm_scale.config.schema import Config
from ebwm_scale.config.sizes import SIZES
from ebwm_scale.core import renamed_keys
from ebwm_scale.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "path",
    sorted(set((ROOT / "configs").rglob("*.yaml")) - set((ROOT / "configs" / "studies").iterdir())),
    ids=lambda path: path.stem,
)
def test_every_shipped_configuration_is_valid_and_reads_back(path):
    config = load_config(path)
    assert config_from_dict(yaml.safe_load(config.to_yaml())) == config


def test_s1_s2_and_algorithm_1_are_configurations():
    config = {
        name: load_config(ROOT / "configs" / "nlp" / f"{name}.yaml").refinement
        for name in ("s1", "s2", "algorithm1")
    }
    assert {name: (r.graph, r.loss) for name, r in config.items()} == {
        "s1": ("detach", "every"),
        "s2": ("truncate", "last"),
        "algorithm1": ("full", "last"),
    }
    assert (
        config["s1"].learning_rate_multiplier == 1500
        and not config["s2"].learnable
        and config["s2"].replay
    )


@pytest.mark.parametrize("size", SIZES)
def test_sizes_fill_what_is_absent_and_explicit_keys_win(size):
    config = config_from_dict({"model": {"size": size}})
    assert (config.model.num_layers, config.model.width, config.model.num_heads) == SIZES[size]
    assert (
        config.model.feed_forward_width == config.model.width
        and config.model.num_kv_heads == config.model.num_heads
    )
    assert config_from_dict({"model": {"size": size, "num_layers": 1}}).model.num_layers == 1


def test_overrides_win_and_yaml_words_become_what_the_key_needs():
    config = load_config(
        None,
        [
            "optimizer.learning_rate=1e-3",
            "logging.wandb=off",
            "refinement.schedule.noise=[[0, 1], [1, 0.1]]",
            "train.max_minutes=3",
        ],
    )
    assert (
        config.optimizer.learning_rate == 1e-3
        and config.logging.wandb == "off"
        and config.train.max_minutes == 3.0
    )
    assert config.refinement.schedule.noise == ((0.0, 1.0), (1.0, 0.1))


@pytest.mark.parametrize(
    "values, parts",
    [
        ({"refinment": {}}, ["refinment: unknown key; did you mean refinement?"]),
        ({"model": {"widht": 3}}, ["model.widht: unknown key; did you mean model.width?"]),
        ({"model": {"width": True}}, ["model.width is True: expected a whole number, or null"]),
        ({"train": {"seed": 1.5}}, ["train.seed is 1.5: expected a whole number"]),
        ({"optimizer": {"learning_rate": "nan"}}, ["a finite number"]),
        ({"model": "xxs"}, ["model: expected a section"]),
        ({"refinement": {"num_steps": 0}}, ["refinement.num_steps is 0: must be above 0"]),
        ({"refinement": {"num_steps": 2, "min_num_steps": 3}}, ["min_num_steps is 3"]),
        ({"refinement": {"reencode": 7}}, ["refinement.reencode is 7", "model.num_layers 6"]),
        ({"refinement": {"reencode": "some"}}, ["refinement.reencode"]),
        (
            {"refinement": {"reencode": "all", "num_steps": 1}},
            ["refinement.reencode is all with refinement.num_steps 1"],
        ),
        (
            {"refinement": {"reencode": "all", "compile": True}},
            ["refinement.reencode is all with refinement.compile"],
        ),
        ({"refinement": {"reencode_every": 2}}, ["leave the key out"]),
        (
            {
                "refinement": {"reencode": 1, "reencode_every": 2},
                "model": {"conditioning": "adaln"},
            },
            ["refinement.reencode_every is 2 with model.conditioning adaln"],
        ),
        (
            {
                "refinement": {"reencode": "all", "tile_rows": 5},
                "data": {"context_length": 6},
            },
            ["refinement.tile_rows is 5", "at least data.context_length 6"],
        ),
        (
            {"refinement": {"reencode": "all"}, "model": {"kind": "baseline"}},
            ["a baseline takes no further step"],
        ),
        (
            {"state": {"workspace": 4}, "refinement": {"num_steps": 1}},
            ["state.workspace is 4 with refinement.num_steps 1"],
        ),
        ({"state": {"workspace": 4}, "refinement": {"replay": True}}, ["use replay false"]),
        ({"state": {"workspace": 4}, "refinement": {"compile": True}}, ["use compile false"]),
        (
            {"state": {"workspace": 4}, "model": {"kind": "baseline"}},
            ["a baseline refines nothing"],
        ),
        (
            {"state": {"workspace_initial": "random_noise"}},
            ["state.workspace_initial is random_noise without state.workspace"],
        ),
        ({"refinement": {"step_size_random_factor": 0.5}}, ["must be 1 or more"]),
        ({"refinement": {"schedule": {"noise": [[0.5, 1], [0.1, 1]]}}}, ["progress must rise"]),
        (
            {"state": {"kind": "embedding"}, "data": {"mask_document_starts": True}},
            ["only text has documents"],
        ),
        (
            {"model": {"conditioning": "time_embed"}, "data": {"mask_documents": True}},
            ["data.mask_documents is true with model.conditioning time_embed"],
        ),
        (
            {"data": {"manifest": "a.json", "sources": [{"manifest": "b.json"}]}},
            ["data.manifest and data.sources are both given"],
        ),
        (
            {
                "data": {"group_size": 6, "grid": [2, 2], "context_length": 9},
                "refinement": {"tile_rows": 5},
                "model": {"width": 16, "num_heads": 4, "conditioning": "time_embed"},
            },
            [
                "data.grid is [2, 2] with data.group_size 6",
                "data.context_length is 9: must be a multiple of data.group_size 6",
                "refinement.tile_rows is 5",
                "model.conditioning is time_embed with data.group_size 6",
                "model.width over model.num_heads is 4: positions in groups have 3 coordinates",
            ],
        ),
        (
            {"data": {"group_size": 6, "mask_documents": True}},
            ["data.mask_documents is true with data.group_size 6"],
        ),
        (
            {"data": {"sources": [{"manifest": "b.json", "weight": 0}, {}]}},
            ["sources[0].weight is 0", "sources[1].manifest is absent"],
        ),
        (
            {"data": {"sources": [{"manifst": "b.json"}]}},
            ["data.sources[0].manifst: unknown key; did you mean data.sources[0].manifest?"],
        ),
        ({"data": {"sources": "b.json"}}, ["a list of mappings with the keys manifest, weight"]),
        ({"data": {"sources": ["b.json"]}}, ["data.sources is ", "keys manifest, weight"]),
        ({"refinement": {"schedule": {"noise": [[0, 1, 2]]}}}, ["refinement.schedule.noise"]),
        ({"refinement": {"schedule": {"noise": 3}}}, ["a list of [progress, value] points"]),
        ({"optimizer": {"learning_rate": 10**400}}, ["optimizer.learning_rate"]),
        ({"model": {"width": 10**30}}, ["model.width", "too large for anything"]),
        ({"model": {"width": 2.0}}, ["model.width is 2.0: expected a whole number, or null"]),
        ({"optimizer": {"epsilon": True}}, ["optimizer.epsilon is True: expected a finite number"]),
        ({"refinement": {"learnable": 1}}, ["refinement.learnable is 1: expected true or false"]),
        ({"data": {"stream": ["pipe:cat a.tar"]}}, ["data.stream is given without data.manifest"]),
        ({"state": {"initial": "most_recent"}}, ["state.initial is most_recent"]),
        (
            {"model": {"num_kv_heads": 4}},
            ["model.num_kv_heads is 4: must divide model.num_heads 6"],
        ),
        (
            {"train": {"global_batch_size": 10, "micro_batch_size": 4}},
            ["10 is not a multiple of train.micro_batch_size 4"],
        ),
        (
            {"refinement": {"replay": True}, "train": {"global_batch_size": 5}},
            ["so it must be even"],
        ),
        ({"deepspeed": {"zero_stage": 7}}, ["deepspeed.zero_stage is 7: expected one of 0, 1, 2"]),
        (
            {"model": {"size": "huge"}, "train": {"max_steps": "x"}},
            ["model.size is 'huge'", "train.max_steps is 'x'"],
        ),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_value_and_what_is_allowed(values, parts):
    with pytest.raises(ConfigError) as error:
        config_from_dict(values)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "section, key, value, sentence",
    [
        ("refinement", "loss_weights", "risng", "'risng': expected rising or exits, or a list of"),
        (
            "refinement",
            "loss_weights",
            [1, "a"],
            "[1, 'a']: expected rising or exits, or a list of",
        ),
        ("refinement", "loss_weights", [-2.0], "[-2.0]: expected rising or exits, or a list of"),
        ("refinement", "reencode", "some", "'some': expected none or all, or a whole number"),
        ("refinement", "reencode", -1, "-1: expected none or all, or a whole number"),
        ("refinement", "reencode", 2.5, "2.5: expected none or all, or a whole number"),
        ("model", "energy_head", "linear", "'linear': expected a list of linear, quadratic"),
        ("data", "grid", [3], "(3,): expected a list of 2 whole numbers"),
    ],
)
def test_a_key_of_several_kinds_of_values_is_one_sentence(section, key, value, sentence):
    with pytest.raises(ConfigError) as caught:
        config_from_dict({section: {key: value}})
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{section}.{key} is {sentence}")


def test_a_key_is_read_under_its_old_name_and_said_to_be_old(caplog):
    config = config_from_dict({"refinement": {"checkpoint": "block"}})
    assert config.refinement.recompute == "block"
    assert "checkpoint" not in config.to_dict()["refinement"]
    renamed_keys._said.clear()
    config_from_dict({"refinement": {"checkpoint": "step"}})
    assert "refinement.checkpoint is the old name of refinement.recompute" in caplog.text
    both = {"refinement": {"checkpoint": "block", "recompute": "step"}}
    with pytest.raises(ConfigError, match="are both given"):
        config_from_dict(both)


def test_every_key_is_documented_in_the_schema():
    schema = Config.model_json_schema()
    refinement = schema["$defs"]["RefinementConfig"]["properties"]
    assert refinement["tile_rows"]["description"].startswith("(sample, position) rows")
    assert refinement["num_steps"]["exclusiveMinimum"] == 0
    assert schema["additionalProperties"] is False


def test_unreadable_files_are_one_line(tmp_path):
    (tmp_path / "bad.yaml").write_text("model: [")
    for path in (tmp_path / "bad.yaml", tmp_path / "absent.yaml"):
        with pytest.raises(ConfigError) as error:
            load_config(path)
        assert "\n" not in str(error.value) and path.name in str(error.value)
    with pytest.raises(ConfigError, match="expected section.key=value"):
        load_config(None, ["train.max_steps"])


def test_batch_arithmetic_divides_or_says_what_would():
    train = config_from_dict({"train": {"global_batch_size": 24}}).train
    assert batch_arithmetic(train, 4) == (6, 1)
    with pytest.raises(ConfigError, match="for example 25"):
        batch_arithmetic(train, 5)
    with pytest.raises(ConfigError, match="must be even"):
        batch_arithmetic(train, 8, paired=True)
    train = config_from_dict({"train": {"global_batch_size": 24, "micro_batch_size": 4}}).train
    with pytest.raises(ConfigError, match=r"allowed: \[1, 2, 3, 6\]"):
        batch_arithmetic(train, 4)
    assert batch_arithmetic(train, 2) == (4, 3)
