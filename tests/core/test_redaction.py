"""No password, signature or token of an address or command is written down; what is no secret stays
readable.
"""

import json

import pytest

from ebwm_scale.core.redaction import redacted, redacted_error

HIDDEN = {
    "https://me:hunter2@host/a.tar": "https://***@host/a.tar",
    "https://hunter2@host/a.tar": "https://***@host/a.tar",
    "https://me:hunter2@host:8443/a.tar": "https://***@host:8443/a.tar",
    "s3://AKIA:hun/ter2+x@bucket/a.tar": "s3://***@bucket/a.tar",
    "ftp://me:hunter2@x@host/a.tar": "ftp://***@host/a.tar",
    "simplecache::https://me:hunter2@host/a.tar": "simplecache::https://***@host/a.tar",
    "https://host/a.tar?X-Amz-Signature=hunter2&X-Amz-Date=1": "https://host/a.tar?X-Amz-Signature=***&X-Amz-Date=***",
    "https://host/a.tar?sv=2020&sig=hunter2%3D": "https://host/a.tar?sv=***&sig=***",
    "https://host/a.tar?hunter2": "https://host/a.tar?***",
    "https://host/a.tar#token=hunter2": "https://host/a.tar#token=***",
    "pipe:curl -s 'https://host/a.tar?sig=hunter2' | cat": (
        "pipe:curl -s 'https://host/a.tar?sig=***' | cat"
    ),
    "pipe:curl -u me:hunter2 https://host/a.tar": "pipe:curl -u *** https://host/a.tar",
    "pipe:curl --user 'me:hunter2' https://host/a": "pipe:curl --user *** https://host/a",
    "pipe:curl -H 'Authorization: Bearer hunter2' https://host/a": (
        "pipe:curl -H 'Authorization: ***' https://host/a"
    ),
    "pipe:curl -H 'X-Api-Key: hunter2' https://host/a": "pipe:curl -H 'X-Api-Key: ***' https://host/a",
    "pipe:get --password hunter2 a.tar": "pipe:get --password *** a.tar",
    "pipe:get --token=hunter2 a.tar": "pipe:get --token=*** a.tar",
    "pipe: AWS_SECRET_ACCESS_KEY=hunter2 aws s3 cp s3://b/a -": (
        "pipe: AWS_SECRET_ACCESS_KEY=*** aws s3 cp s3://b/a -"
    ),
    "pipe:AWS_SECRET_ACCESS_KEY=hunter2 aws s3 cp s3://b/a -": (
        "pipe:AWS_SECRET_ACCESS_KEY=*** aws s3 cp s3://b/a -"
    ),
    "pipe:cd /d;HF_TOKEN=hunter2 get a.tar": "pipe:cd /d;HF_TOKEN=*** get a.tar",
    "pipe:(API_KEY=hunter2 get a.tar)|cat": "pipe:(API_KEY=*** get a.tar)|cat",
    "403, url='https://host/a.tar?sig=hunter2': no": "403, url='https://host/a.tar?sig=***': no",
}
ERRORS = {  # what is said of an address: what is shown
    (
        "s3://AKIA:hunter2@b/a",
        'Invalid bucket name "AKIA:hunter2@b"',
    ): 'Invalid bucket name "***@b"',
    ("s3://AKIA:hunter2@b/a", "password hunter2 refused"): "password *** refused",
    ("s3://AKIA:hun%2Fter2@b/a", "AKIA:hun/ter2 and AKIA:hun%2Fter2"): "*** and ***",
    ("https://hunter2@host/a", "account hunter2, host host"): "account ***, host host",
    ("https://h/a?sig=hunter2%3D&v=1", "hunter2= is over, v 1"): "*** is over, v 1",
    ("https://h/a.tar", "403, url='https://me:hunter2@h/'"): "403, url='https://***@h/'",
    ("/data/a.tar", "no such file /data/a.tar"): "no such file /data/a.tar",
    ("https://h/v@2/a", "h has no v@2"): "h has no v@2",
}
KEPT = [
    "/data/train-000000.tar",
    "s3://bucket/train-{000000..000127}.tar",
    "https://host:8443/path@v2/a.tar",
    "pipe:aws s3 cp s3://bucket/a.tar -",
    "sample train-000000003 (tokens.npy, offset 512, 98 bytes): checksum is 0a, the index says 0b",
    "loss 3.5; the tokenizer: tokenizer.model, 5,000 tokens/s",
    "tokens: 5, num_tokens = 7",
]


@pytest.mark.parametrize("text", HIDDEN)
def test_secrets_are_hidden_and_the_rest_stays(text):
    assert redacted(text) == HIDDEN[text] and "hunter2" not in redacted(text)
    assert redacted(redacted(text)) == redacted(text)


@pytest.mark.parametrize("address, said", ERRORS)
def test_what_a_library_says_of_an_address_gives_no_part_of_its_secrets_away(address, said):
    assert redacted_error(ValueError(said), address) == ERRORS[address, said]


@pytest.mark.parametrize("text", KEPT)
def test_what_holds_no_secret_is_not_changed(text):
    assert redacted(text) == text


def test_lists_and_objects_are_walked_through():
    value = {"data": {"stream": ["https://me:x@h/a"], "n": 3}, "flag": True, "none": None}
    expected = {"data": {"stream": ["https://***@h/a"], "n": 3}, "flag": True, "none": None}
    assert redacted(value) == expected
    assert redacted("//" * 10**5) == "//" * 10**5  # in bounded time
    assert len(redacted("a:" * 10**5 + "https://" + "x" * 10**5)) > 10**5


ADDRESS = "https://me:hunter2@host/a.tar?X-Amz-Signature=hunter2"


def test_events_warnings_the_report_and_the_tracker_hold_no_secret(
    tmp_path, monkeypatch, capsys, open_run_folder
):
    import sys
    import types

    from ebwm_scale.config.load import config_from_dict
    from ebwm_scale.report import write_report

    data = {"manifest": "m.json", "stream": [ADDRESS]}
    config = config_from_dict({"data": data, "logging": {"wandb": "offline"}})
    tracked = {}
    quiet = {name: lambda *_, **__: None for name in ("define_metric", "log", "finish")}

    def init(**given):
        tracked.update(given)
        return types.SimpleNamespace(**quiet)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    run = open_run_folder(tmp_path, config)
    run.event("start", command=["train.py", "--set", f"data.stream=[{ADDRESS}]"])
    run.warn(f"{ADDRESS}: 403, message='Forbidden', url='{ADDRESS}'", step=1)
    run.metrics({"step": 1, "loss": 1.0, "loss_per_step": [1.0]})
    page = write_report(tmp_path)
    written = [
        json.dumps(tracked["config"]),
        capsys.readouterr().err,
        (tmp_path / "events.jsonl").read_text(),
        page.read_text(),
    ]
    for text in written:
        assert "hunter2" not in text and "https://***@host/a.tar?X-Amz-Signature=***" in text
    assert "hunter2" in (tmp_path / "config.yaml").read_text()  # a resumed run reads it
