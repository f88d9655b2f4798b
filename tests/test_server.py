"""Servers as they really behave: no answer, refusals of a form, pauses asked for, proxies; and what comes of it in a file of responses."""
import json
import socket
import time
from email.utils import formatdate

import pytest
from scripted import scripted, speak

from safeeraser.core import SafeEraserError
from safeeraser.generate import generate
from safeeraser.rows import read_rows
from safeeraser.judge import judge_rows
from safeeraser.rows import answer_of
from safeeraser.metrics import result_row
from safeeraser.server import Call, Server, ask_all, check_url, estimate


@pytest.fixture
def server():
    with scripted(answer=speak, model="merged") as s: yield s


def client(server, **options): return Server(server.url, server.model, **{"pause": .01} | options)


def says(content, finish="stop", **more):
    "A reply of status 200 with this content."
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "merged", "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content} | more}]}
    return lambda handler, n: handler.reply(200, json.dumps(body).encode())


def fails(status, message="", body=None, **headers):
    return lambda handler, n: handler.reply(status, json.dumps(body or {"error": {"message": message}}).encode(), **headers)


NONE = {"empty, length": says("", "length"), "empty, filter": says("", "content_filter"), "half, filter": says("It is a", "content_filter"), "null": says(None), "null, length": says(None, "length"),
        "only thought, apart": says("", "stop", reasoning_content="A cup, and"), "cut thought": says("<think>A cup, and", "length"), "blank, length": says(" \n", "length"),
        "status 400, filter": fails(400, body={"error": {"code": "content_filter", "message": "filtered"}})}


@pytest.mark.parametrize("name", NONE)
def test_a_reply_without_an_answer_is_kept_unscored_and_asked_once(name, server, tiny, tmp_path):
    server.misbehave = lambda handler, n: NONE[name](handler, n) if n % 4 == 0 else handler.good(server.seen[-1])
    rows = read_rows(generate("merged", tiny.data, tmp_path / "r.jsonl", splits=["val"], server=server.url, progress=False))
    none = [r for r in rows if answer_of(r) is None]
    assert len(none) == len(rows) // 4 == len(server.seen) // 4 and all(r["finish_reason"] for r in none)
    counted = result_row(judge_rows(rows, "rule"), "rule")
    assert sum(counted[f"{m}_unscored"] for m in ("rr_generality", "sarr")) == sum(r["set"] != "retain" for r in none)
    paid = len(server.seen)
    generate("merged", tiny.data, tmp_path / "r.jsonl", splits=["val"], server=server.url, progress=False)
    assert len(server.seen) == paid  # finished is finished


def test_an_answer_is_an_answer_however_it_ended(server):
    for said, finish in (("It is red", "length"), ("", "stop"), ("<think>A cup.</think>Red.", "stop")):
        server.misbehave = says(said, finish)
        reply = client(server).ask(Call("", "a"))
        assert (reply.text, reply.finish, reply.ended) == (said, finish, True)


@pytest.mark.parametrize("fail, said", [(fails(401, "Incorrect API key"), "status 401: Incorrect API key"), (fails(404, "The model `m` does not exist"), "status 404: The model `m` does not exist"),
                                        (fails(400, body={"detail": "no images here"}), "status 400: no images here"), (fails(422, body={"detail": [{"msg": "field required"}]}), "field required"),
                                        (lambda h, n: h.reply(403, b"Forbidden by\x1b[31m policy", "text/plain"), "status 403: Forbidden by [31m policy"), (fails(200, body={"error": {"code": 401, "message": "no"}}), "status 401: no")])
def test_the_server_s_own_words_are_told_and_the_command_fails(fail, said, server, tiny, tmp_path):
    server.misbehave = fail
    with pytest.raises(SafeEraserError) as e: generate("merged", tiny.data, tmp_path / "r.jsonl", server=server.url, progress=False)
    assert said in str(e.value) and "\n" not in str(e.value) and "\x1b" not in str(e.value) and not list(tmp_path.iterdir())
    assert len(server.seen) <= 8 * 4  # each once


def test_max_completion_tokens_where_it_is_asked_for(server):
    def picky(handler, n):
        asked = server.seen[-1]
        if "max_tokens" in asked: return fails(400, "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.")(handler, n)
        handler.good(asked)
    server.misbehave = picky
    replies = ask_all(client(server, at_once=1, tries=1), [Call("", w, max_tokens=77) for w in "abc"], progress=False)
    assert [r.text for r in replies] == [speak("", w) for w in "abc"]
    assert [("max_tokens" in a, a.get("max_completion_tokens")) for a in server.seen] == [(True, None), (False, 77), (False, 77), (False, 77)]


@pytest.mark.parametrize("status, message", [(400, "System role not supported"), (400, "Conversation roles must alternate user/assistant/user/assistant/..."), (500, "jinja2.exceptions.TemplateError: System role not supported"),
                                             (422, "unexpected role: system")])
def test_an_instruction_goes_into_the_user_s_turn_where_there_is_no_other(status, message, server):
    server.misbehave = lambda handler, n: fails(status, message)(handler, n) if server.seen[-1]["messages"][0]["role"] == "system" else handler.good(server.seen[-1])
    mine = client(server, at_once=1, tries=1)
    assert [mine.ask(Call("Be brief.", w)).text for w in "ab"] == [speak("", f"Be brief.\n\n{w}") for w in "ab"]
    assert len(server.seen) == 3


FIRST = {"409": fails(409), "429": fails(429), "503": fails(503), "no choices": lambda h, n: h.reply(200, b'{"choices": []}'), "error in 200": fails(200, "busy"), "429 in 200": fails(200, body={"error": {"code": 429, "message": "slow down"}}),
         "error as text": fails(200, body={"error": "overloaded"})}


@pytest.mark.parametrize("name", FIRST)
def test_what_may_pass_is_tried_again(name, server):
    server.misbehave = lambda handler, n: FIRST[name](handler, n) if n < 3 else handler.good(server.seen[-1])
    assert client(server).ask(Call("", "a")).text == speak("", "a") and len(server.seen) == 3


@pytest.mark.parametrize("first", [fails(429, **{"Retry-After": "0.6"}), fails(503, **{"Retry-After": formatdate(time.time() + 3600 * 0 + 1, usegmt=True)}), fails(429, **{"retry-after-ms": "600"}),
                                   fails(200, body={"error": {"code": 429, "retry_after": .6}}), fails(200, body={"error": {"code": 429, "metadata": {"headers": {"Retry-After": "0.6"}}}})], ids=range(5))
def test_a_server_that_says_when_to_come_back_is_obeyed(first, server, monkeypatch):
    waits = []
    monkeypatch.setattr("safeeraser.server.time.sleep", waits.append)
    monkeypatch.setattr("safeeraser.server.time.time", lambda now=time.time(): now)
    server.misbehave = lambda handler, n: first(handler, n) if n == 1 else handler.good(server.seen[-1])
    assert client(server).ask(Call("", "a")).text == speak("", "a")
    assert len(waits) == 1 and (waits[0] == .6 or waits[0] <= 1)
    server.misbehave = fails(429, **{"Retry-After": "86400"})
    assert "come back in 86,400 s" in client(server).ask(Call("", "a")).problem and len(waits) == 1


def test_a_proxy_that_the_environment_names_is_used(server, monkeypatch):
    with scripted(answer=lambda *a: "by the proxy", model="merged") as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        monkeypatch.setenv("NO_PROXY", "")
        assert client(server).ask(Call("", "a")).text == "by the proxy"
        monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")  # would pass the proxy in the open
        with pytest.raises(SafeEraserError, match="travel unencrypted"): client(server)
        monkeypatch.delenv("OPENAI_API_KEY")
        for name in ("NO_PROXY", "no_proxy"): monkeypatch.setenv(name, "127.0.0.1")
        assert client(server).ask(Call("", "a")).text == speak("", "a")
        for name in ("NO_PROXY", "no_proxy"): monkeypatch.setenv(name, "")
        monkeypatch.setenv("http_proxy", "nonsense://x")
        with pytest.raises(SafeEraserError, match="proxy that the environment names"): client(server)


def closed_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_a_port_where_nobody_listens_is_told_at_once(tiny, tmp_path):
    begin = time.monotonic()
    with pytest.raises(SafeEraserError, match="nobody listens there .*refused"):
        generate("m", tiny.data, tmp_path / "r.jsonl", server=f"http://127.0.0.1:{closed_port()}/v1", progress=False)
    assert time.monotonic() - begin < 6 and not (tmp_path / "r.jsonl.part").exists()


def test_a_server_that_was_there_is_waited_for(server, monkeypatch):
    "Refused at first, then there; later it breaks off, and is asked as often as any."
    asked, nap = client(server, pause=1), []
    monkeypatch.setattr(time, "sleep", nap.append)
    asked.client.base_url = f"http://127.0.0.1:{closed_port()}/v1"
    assert "nobody listens there" in asked.ask(Call("", "a")).problem
    asked.client.base_url = server.url
    assert asked.ask(Call("", "a")).text
    asked.client.base_url, asked.deaf_since, nap[:] = f"http://127.0.0.1:{closed_port()}/v1", -1e9, []
    assert "(5 tries)" in asked.ask(Call("", "a")).problem and nap == [1, 2, 4, 8]


def test_a_server_that_hangs_costs_an_estimate_only_seconds(tmp_path):
    import socket
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        start = time.monotonic()
        hanging = Server(f"http://127.0.0.1:{deaf.getsockname()[1]}/v1", "m", cache=tmp_path)
        assert estimate([Call("", "a")], hanging)["calls"] == 1 and time.monotonic() - start < 15


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1\n", "http://h:x/v1", "http://h:0/v1", "http://h:99999/v1", "http:///v1", "ftp://h/v1", "http://h /v1", "http://[::1/v1", ""])
def test_what_is_no_url_is_one_sentence(url):
    with pytest.raises(SafeEraserError, match="a URL such as") as e: check_url(url)
    assert "\n" not in str(e.value)


def test_texts_that_cannot_be_written_are_mended(server, tiny, tmp_path):
    server.misbehave = lambda handler, n: handler.reply(200, b'{"model": "merged", "choices": [{"finish_reason": "stop", "message": {"content": "half \\ud83d and \\u2028 line\\u0085"}}]}')
    rows = read_rows(generate("merged", tiny.data, tmp_path / "r.jsonl", splits=["val"], server=server.url, progress=False))
    assert {r["response"] for r in rows} == {"half \ufffd and \u2028 line"}


def test_answers_of_two_models_are_not_mixed(server, tiny, tmp_path):
    reply = lambda model: lambda handler, n: handler.reply(200, json.dumps({"model": model, "choices": [{"finish_reason": "stop", "message": {"content": "a cup"}}]}).encode()) if n % 5 else handler.reply(400, b"{}")
    server.misbehave = reply("merged-2024")
    out = tmp_path / "r.jsonl"
    with pytest.raises(SafeEraserError, match="questions got no answer"): generate("merged", tiny.data, out, server=server.url, progress=False)
    server.misbehave = reply("merged-2025")
    with pytest.raises(SafeEraserError, match="answers of one model"): generate("merged", tiny.data, out, server=server.url, progress=False)
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl.part").read_text().splitlines()[1:]]
    assert {r["answered_by"] for r in rows} == {"merged-2024"}
