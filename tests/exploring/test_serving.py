"""The explorer's server answers one person on one machine: with the token, under its own name, and
with nothing but its pages.
"""

import socket
import sys

import pytest

from ebwm_scale import explore
from ebwm_scale.core.errors import UserError

server = pytest.importorskip(
    "ebwm_scale.exploring.server",
    reason="a package of the extra explore is not installed",
    exc_type=ModuleNotFoundError,
)
testclient = pytest.importorskip("starlette.testclient", reason="starlette is not installed")

TOKEN = "a-token-of-a-test"


@pytest.fixture
def client(opened):
    app = server.application(opened("text", "--max-new", "2"), TOKEN)
    return testclient.TestClient(app, base_url="http://127.0.0.1:8000")


def test_a_prompt_is_answered_and_saved(client):
    start = client.get(f"/{TOKEN}/")
    assert start.status_code == 200 and "<textarea" in start.text
    assert "<section" not in start.text
    answer = client.post(f"/{TOKEN}/", data={"prompt": "abc <b>", "max_new": "2"})
    assert answer.status_code == 200 and 'data-position="8"' in answer.text
    assert "abc &lt;b&gt;</textarea>" in answer.text
    saved = client.post(f"/{TOKEN}/export", data={"prompt": "abc <b>", "max_new": "2"})
    assert saved.headers["content-disposition"] == 'attachment; filename="explored.html"'
    assert "<form" not in saved.text and 'data-position="8"' in saved.text


def test_a_mistake_keeps_what_was_typed(client):
    answer = client.post(f"/{TOKEN}/", data={"prompt": "my words", "max_new": "9999"})
    assert answer.status_code == 400 and 'role="alert"' in answer.text
    assert "new tokens is &#39;9999&#39;" in answer.text
    assert "my words</textarea>" in answer.text and 'value="9999"' in answer.text
    saved = client.post(f"/{TOKEN}/export", data={"prompt": "my words", "seed": "x"})
    assert saved.status_code == 400 and "content-disposition" not in saved.headers


def test_pages_of_a_world_are_served_and_guarded_in_the_same_way(opened):
    app = server.application(opened("world", "--budget", "6"), TOKEN)
    client = testclient.TestClient(app, base_url="http://127.0.0.1:8000")
    assert "The next frame, step by step" in client.get(f"/{TOKEN}/").text
    saved = client.post(f"/{TOKEN}/export", data={"number": "1", "num_ahead": "1"})
    assert saved.headers["content-disposition"] == 'attachment; filename="explored.html"'
    assert "<form" not in saved.text and "episode 1 of 0 to" in saved.text
    hostile = {"action": "<script>alert(1)</script>\x00", "number": "<b>"}
    refused = client.post(f"/{TOKEN}/", data=hostile)
    assert refused.status_code == 400 and 'role="alert"' in refused.text
    assert "<script>alert" not in refused.text and "\x00" not in refused.text
    assert client.get("/other/").status_code == 403
    assert client.get(f"/{TOKEN}/", headers={"host": "evil.example"}).status_code == 400


@pytest.mark.parametrize("path", ["/", "/other/", "/other/export", f"/{TOKEN[:-1]}/", "/é/"])
def test_another_token_is_refused(client, path):
    for answer in (client.get(path), client.post(path, data={"prompt": "abc"})):
        assert answer.status_code in (403, 404, 405)
        assert TOKEN not in answer.text and "textarea" not in answer.text


@pytest.mark.parametrize(
    "path", ["config.yaml", "../config.yaml", "%2e%2e/%2e%2e/etc/passwd", "static/x", "%00"]
)
def test_no_file_is_served(client, path):
    assert client.get(f"/{TOKEN}/{path}").status_code in (403, 404, 405)


def test_other_names_of_the_host_are_refused(client):
    answer = client.get(f"/{TOKEN}/", headers={"host": "evil.example"})
    assert answer.status_code == 400 and "textarea" not in answer.text


def test_what_is_no_form_is_refused_in_one_line(client):
    url = f"/{TOKEN}/"
    for body in (b"prompt=%ff", b"prompt=\xff", b"a=1&" * 50, b"x=" + b"a" * (2 * 2**20)):
        answer = client.post(url, content=body)
        assert answer.status_code == 400 and answer.text.count("\n") == 1


def test_every_answer_forbids_what_a_page_does_not_need(client):
    for answer in (client.get(f"/{TOKEN}/"), client.get("/other/"), client.get("/a/b/c")):
        headers = answer.headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert (
            headers["referrer-policy"] == "no-referrer" and headers["cache-control"] == "no-store"
        )


def test_only_this_machine_can_connect_and_a_taken_port_is_one_line():
    listening = server.listen(0)
    try:
        host, port = listening.getsockname()
        assert host == "127.0.0.1" and port > 0
        with pytest.raises(UserError, match=f"--port {port}: .*give another, or 0"):
            server.listen(port)
        with pytest.raises(UserError, match="--port 99999"):
            server.listen(99999)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as outside:
            outside.settimeout(1)
            with pytest.raises(OSError):
                outside.connect(("127.0.0.2", port))
    finally:
        listening.close()


def test_tokens_are_long_and_never_the_same():
    tokens = {server.new_token() for _ in range(50)}
    assert len(tokens) == 50 and min(map(len, tokens)) >= 20


def test_the_command_prints_the_address_and_serves_it(opened, monkeypatch, capsys):
    served = []

    def serve(app, listening):
        served.append(listening.getsockname()[1])
        listening.close()

    monkeypatch.setattr(server, "serve", serve)
    assert explore.main(["text"]) == 0
    address = capsys.readouterr().out
    assert address.startswith(f"http://127.0.0.1:{served[0]}/") and address.endswith("/\n")
    assert len(address.split("/")[3]) >= 20


def test_without_its_packages_the_command_says_what_to_install(opened, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "ebwm_scale.exploring.server")
    assert explore.main(["text"]) == 2
    printed = capsys.readouterr().err
    assert "pip install 'ebwm_scale[explore]'" in printed and "--export page.html" in printed
    assert printed.count("\n") == 1
