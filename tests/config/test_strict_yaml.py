"""YAML as people type it: nothing is silently another value than it looks, and whatever cannot be
read is one line.
"""

import math

import pytest
import yaml

from ebwm_scale.cluster.sweep import expand
from ebwm_scale.config.load import config_from_dict, load_config
from ebwm_scale.config.strict_yaml import dump_yaml, parse_yaml, read_yaml
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.train import main as train

DEEP = "[" * 100_000
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi")
)
REFUSED = {
    "duplicate_section": (
        "train: {seed: 1}\ntrain: {max_steps: 2}",
        "the key train is there twice",
    ),
    "duplicate_key": (
        "train:\n  seed: 1\n  seed: 2",
        "the key seed is there twice, first in line 2",
    ),
    "duplicate_in_flow": ("deepspeed: {raw: {a: {b: 1, b: 2}}}", "the key b is there twice"),
    "duplicate_by_quotes": ("train: {seed: 1}\n'train': {}", "the key train is there twice"),
    "duplicate_by_value": ("0x1: a\n1: b", "there twice"),
    "alias": ("model: &m {width: 32}\nstate: *m", "*m is an alias"),
    "recursive_alias": ("deepspeed: {raw: &r {a: *r}}", "*r is an alias"),
    "billion_laughs": (BOMB, "*a is an alias"),
    "merge_of_an_alias": ("model: &m {width: 32}\nstate: {<<: *m}", "*m is an alias"),
    "long_integer": ("train: {seed: 1" + "0" * 5000 + "}", "no whole number of 64 bits"),
    "integer_of_23_digits": ("train: {seed: " + "1" * 23 + "}", "no whole number of 64 bits"),
    "long_hexadecimal": ("train: {seed: 0x" + "f" * 5000 + "}", "no whole number of 64 bits"),
    "deep_flow": ("deepspeed: {raw: " + DEEP, "levels deep"),
    "deep_block": ("\n".join(" " * n + "a:" for n in range(2000)), "levels deep"),
    "deep_sequence": ("- " * 100_000, "levels deep"),
    "tag_of_python": ("model: !!python/object/apply:os.system [true]", "is not allowed"),
    "tag_of_a_date": ("model: !!timestamp 2024-01-01", "is not allowed"),
    "bytes": ("model: !!binary aGVsbG8=", "is not allowed"),
    "wrong_tag": ("train: {seed: !!int x}", "'x' is no int"),
    "key_that_is_a_list": ("? [a]\n: 1", "a key is a list or a mapping"),
    "two_documents": ("train: {}\n---\ntrain: {}", "another document"),
    "no_character": ('train: {seed: "\\Uffffffff"}', "no character"),
    "null_character": ('data: {manifest: "a\\0b"}', "no file can hold"),
    "half_a_pair": ('data: {manifest: "\\ud800"}', "no file can hold"),
    "control_character": ("train: \x00", "not allowed"),
    "tab": ("train:\n\tseed: 1", "cannot start any token"),
    "list": ("- a", "expected sections"),
    "text": ("hello", "expected sections"),
    "number": ("0", "expected sections"),
    "false": ("false", "expected sections"),
}


def refusal(function, *arguments) -> str:
    with pytest.raises(ConfigError) as error:
        function(*arguments)
    line = str(error.value)
    assert "\n" not in line and line.isprintable() and len(line) < 500
    return line


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_not_plain_is_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, part = REFUSED[name]
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    assert part in refusal(load_config, "mine.yaml")


@pytest.mark.parametrize(
    "content, part",
    [
        (b"train: {seed: 1} # \xff", "not UTF-8: byte 0xff at position 19"),
        ("train: {}".encode("utf-16"), "not UTF-8"),
        (b"# " + b"x" * 5_000_000, "4 MiB"),
    ],
)
def test_bytes_that_are_no_text_are_refused_in_one_line(content, part, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(content)
    assert part in refusal(load_config, tmp_path / "mine.yaml")
    assert part in refusal(expand, [], str(tmp_path / "mine.yaml"))


def test_a_folder_or_an_absent_file_is_one_line(tmp_path):
    assert "directory" in refusal(read_yaml, tmp_path)
    assert "No such file" in refusal(read_yaml, tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    "text, value",
    [
        ("0100", 100),
        ("0o100", 64),
        ("0x1F", 31),
        ("+7", 7),
        ("1e-4", 1e-4),
        ("1E4", 1e4),
        (".5", 0.5),
        ("5.", 5.0),
        ("-.inf", -math.inf),
        ("1:30", "1:30"),
        ("190:20:30", "190:20:30"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("2024-02-31", "2024-02-31"),
        ("2024-01-01 10:00:00", "2024-01-01 10:00:00"),
        ("yes", "yes"),
        ("off", "off"),
        ("True", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("<<", "<<"),
        ("=", "="),
        ("'1'", "1"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    for found in (parse_yaml(text, "here"), (parse_yaml(f"k: {text}", "here") or {})["k"]):
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text", ["1e-3", "0100", "0o17", "1:30", "yes", "2024-01-01", "~", "", "<<"]
)
def test_what_is_written_reads_back_the_same_by_both_versions_of_yaml(text):
    written = dump_yaml({"text": text, "numbers": [1, 1e-5, 1e16, -0.5], "same": [text, text]})
    assert parse_yaml(written, "here") == yaml.safe_load(written)
    config = config_from_dict({"logging": {"run_name": text}, "deepspeed": {"raw": {"key": text}}})
    assert config_from_dict(parse_yaml(config.to_yaml(), "here")) == config


@pytest.mark.parametrize(
    "override, part",
    [
        ("optimizer.epsilon=1" + "0" * 400, "no whole number of 64 bits"),
        ("optimizer.epsilon=1e400", "optimizer.epsilon is inf: expected a finite number"),
        ("train.seed=" + "1" * 23, "no whole number of 64 bits"),
        ("train.seed=0o" + "7" * 30, "no whole number of 64 bits"),
        ("train.max_steps=1_000", "train.max_steps is '1_000': expected a whole number"),
        ("train.max_minutes=1:30", "train.max_minutes is '1:30': expected a finite number"),
        ("train.max_minutes=1_0", "expected a finite number"),
        ("refinement.replay=yes", "refinement.replay is 'yes': expected true or false"),
        ("deepspeed.raw={a: 1, a: 2}", "the key a is there twice"),
        ("deepspeed.raw=[&a 1, *a]", "*a is an alias"),
        ("deepspeed.raw=" + DEEP, "levels deep"),
        ("deepspeed.raw." + "a." * 500 + "a=1", "levels deep"),
        ("deepspeed.raw={1: 2}", "with texts as keys, not 1"),
        ("deepspeed.raw={a: [.nan]}", "with finite numbers, not nan"),
        ("deepspeed.raw={a: 1e999}", "with finite numbers, not inf"),
        ("refinement.schedule.noise=" + "[[0, 1], " * 10, "not valid YAML"),
        ("model.size=" + "x" * 10_000, "..."),
        ("x" * 10_000 + ".y=1", "unknown key"),
        ("train." + "x" * 10_000 + "=1", "unknown key"),
        ("train.seed=" + "x" * 10_000, "..."),
        ("train={seed: 1}", "expected section.key=value"),
        ("train.seed.x=1\n", "train.seed is {'x': 1}"),
        ("data.manifest=\udcff", "not UTF-8"),
        ("model.vocabulary_size=1000000000", "too large"),
        ("data.window_shards=9000000000000000000", "too large"),
    ],
)
def test_an_override_that_cannot_be_used_is_one_short_line(override, part):
    assert part in refusal(load_config, None, [override])


def test_a_number_of_hundreds_of_digits_from_elsewhere_is_refused_too():
    assert "finite" in refusal(config_from_dict, {"optimizer": {"epsilon": 10**400}})
    many = {"train": {"max_steps": 10**10, "global_batch_size": 10**10}}
    assert "more samples than 64 bits count" in refusal(config_from_dict, many)


def test_very_many_problems_are_not_all_listed(tmp_path):
    (tmp_path / "mine.yaml").write_text("".join(f"key{n}: 1\n" for n in range(5000)))
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "mine.yaml")
    lines = str(error.value).splitlines()
    assert len(lines) == 41 and lines[-1] == "and 4960 more problems"


def test_overrides_go_into_a_section_that_the_file_names_without_keys(tmp_path):
    (tmp_path / "mine.yaml").write_text("train:\n")
    assert load_config(tmp_path / "mine.yaml", ["train.seed=0100"]).train.seed == 100
    assert load_config(None, ["data.manifest=0100"]).data.manifest == "0100"


SWEEPS = {
    "duplicate_axis": "form: {a: [model.size=xs]}\nform: {b: [model.size=xs]}",
    "duplicate_name": "form: {a: [model.size=xs], a: [model.size=xxs]}",
    "duplicate_name_in_other_words": "width: {8: [model.width=8], '8': [model.width=16]}",
    "alias": "form: {a: &x [model.size=xs], b: *x}",
    "deep": "form: " + DEEP,
    "long_value": "form: {a: " + "x" * 10_000 + "}",
    "empty": "",
}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_file_is_read_by_the_same_parser(name, tmp_path):
    (tmp_path / "axes.yaml").write_text(SWEEPS[name])
    refusal(expand, [], str(tmp_path / "axes.yaml"))


def test_values_of_a_sweep_are_read_by_the_same_parser():
    runs = expand(["train.seed=0100,1e3", "logging.run_name=1:30,off"])
    config = load_config(None, runs[0].overrides)
    assert config.train.seed == 100 and config.logging.run_name == "1:30"
    assert "train.seed is 1000.0" in refusal(load_config, None, runs[-1].overrides)
    assert "at most 10,000" in refusal(
        expand,
        [f"train.seed={','.join('1' * 101)}"] * 1 + [f"train.max_steps={','.join('1' * 100)}"],
    )


def test_train_py_ends_with_2_and_one_line(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(REFUSED["duplicate_section"][0])
    assert train(["--config", str(tmp_path / "mine.yaml")]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "there twice" in printed.err
