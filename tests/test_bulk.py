"""Answers by an engine in another environment, a stand-in for vLLM or SGLang with their command lines: started, asked, always stopped."""
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import command as commands
import pytest
import safeeraser.bulk as bulk
import safeeraser.server as serving
from command import command
from functools import partial
from safeeraser.bulk import bulk_generate
from safeeraser.core import SafeEraserError
from safeeraser.generate import plan_requests
from safeeraser.rows import read_rows
from safeeraser.server import Server
from standin import diary, environment, gone, pids
from standin.server import weights

pytestmark = pytest.mark.skipif(not hasattr(os, "killpg"), reason="wants process groups")


@pytest.fixture
def python(tmp_path, monkeypatch):
    "The Python of an environment with a stand-in for vLLM, whose servers write into `diary.jsonl`."
    monkeypatch.setenv("STANDIN_DIARY", str(tmp_path / "diary.jsonl"))
    monkeypatch.setattr(serving, "Server", partial(Server, pause=.01))
    return environment(tmp_path / "env")


@pytest.fixture
def ask(tiny, tmp_path, python):
    return lambda **more: bulk_generate(**dict(model=tiny.model, data=tiny.data, out=tmp_path / "r.jsonl", engine="vllm", python=python, progress=False) | more)


def asked(tmp_path): return Counter(d["text"] for d in diary(tmp_path / "diary.jsonl") if d["what"] == "call")


def wanted(tiny): return Counter(r.item.question for r in plan_requests(tiny.data))


def test_a_server_that_is_slow_to_get_healthy_answers_every_question_and_is_stopped(ask, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("STANDIN_SLOW", "1")
    for name in ("http_proxy", "HTTP_PROXY"): monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody's
    rows = read_rows(ask())
    assert asked(tmp_path) == wanted(tiny) and gone(pids(tmp_path / "diary.jsonl"))
    assert {r["decoding"]["engine"] for r in rows} == {"vllm 9.9.9"} and not any("answered_by" in r for r in rows)
    assert {r["response"].split()[2] for r in rows} == {weights(tiny.model)}
    started, = [d for d in diary(tmp_path / "diary.jsonl") if d["what"] == "start"]
    assert str(Path(__file__).parents[1]) not in started["path"].split(os.pathsep), "this environment's packages stay out"
    assert os.environ.get("NO_PROXY") is None
    assert ask().read_text() == (tmp_path / "r.jsonl").read_text()
    assert len(pids(tmp_path / "diary.jsonl")) == 2, "a file that is complete starts no server"


def test_a_server_that_dies_at_its_start_leaves_its_last_words_and_nothing_else(ask, tmp_path, monkeypatch):
    monkeypatch.setenv("STANDIN_DIES", "start")
    with pytest.raises(SafeEraserError, match="(?s)vllm 9.9.9 has ended with exit code 1; .*r.jsonl.vllm-0.log:.*No available memory for the cache"): ask()
    assert gone(pids(tmp_path / "diary.jsonl")) and not [p for p in tmp_path.glob("*r.jsonl*") if p.suffix != ".log"]


def test_an_option_that_the_engine_does_not_know_is_told_by_the_engine(ask):
    with pytest.raises(SafeEraserError, match="(?s)exit code 2.*unrecognized arguments: --no-such 1"): ask(engine_args="--no-such 1")


def test_a_server_that_never_gets_healthy_is_given_up(ask, tmp_path, monkeypatch):
    monkeypatch.setenv("STANDIN_SLOW", "600")
    monkeypatch.setattr(bulk, "START_SECONDS", .5)
    with pytest.raises(SafeEraserError, match="was not ready after 0.5 s"): ask()
    assert gone(pids(tmp_path / "diary.jsonl"))


def test_a_server_that_dies_in_the_middle_is_started_anew_by_the_same_command(ask, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("STANDIN_DIES", "20")
    with pytest.raises(SafeEraserError, match="(?s)what is done is kept.*CUDA out of memory"): ask()
    first, part = asked(tmp_path), tmp_path / "r.jsonl.part"
    assert 0 < len(part.read_text().splitlines()) - 1 <= first.total() == 20
    monkeypatch.delenv("STANDIN_DIES")
    rows = read_rows(ask())
    assert len(rows) == wanted(tiny).total() and not part.exists() and gone(pids(tmp_path / "diary.jsonl"))
    assert asked(tmp_path).total() <= wanted(tiny).total() + 20, "what was answered is not asked again"
    ports = [d["argv"][d["argv"].index("--port") + 1] for d in diary(tmp_path / "diary.jsonl") if d["what"] == "start"]
    assert len(ports) == 2


def test_two_gpus_share_the_images_and_one_takes_over_what_another_leaves(ask, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    ask(gpus=2)
    calls = [d for d in diary(tmp_path / "diary.jsonl") if d["what"] == "call"]
    assert asked(tmp_path) == wanted(tiny) and {d["gpu"] for d in calls} == {"4", "5"} and gone(pids(tmp_path / "diary.jsonl"))
    assert len({(d["image"], d["gpu"]) for d in calls}) == len({d["image"] for d in calls}), "an image stays at one server"
    assert capsys.readouterr().err == "" and os.environ["CUDA_VISIBLE_DEVICES"] == "4,5,6"
    monkeypatch.setenv("STANDIN_DIES", "3@5")
    rows = read_rows(ask(gpus=2, out=tmp_path / "again.jsonl"))
    assert Counter(r["question"] for r in rows) == wanted(tiny) and gone(pids(tmp_path / "diary.jsonl"))
    assert f"has ended and others answered for it; its log is {tmp_path}/again.jsonl.vllm-1.log" in capsys.readouterr().err
    with pytest.raises(SafeEraserError, match="--gpus 4: from 1 to the 3 that CUDA_VISIBLE_DEVICES names"): ask(gpus=4, out=tmp_path / "new.jsonl")


def test_shards_have_a_server_each_and_make_one_file(ask, tiny, tmp_path):
    assert ask(shard="1/2").name == "r.jsonl.1-of-2.part" and ask(shard="0/2") == tmp_path / "r.jsonl"
    assert asked(tmp_path) == wanted(tiny) and {p.name for p in tmp_path.glob("r.jsonl*")} == {"r.jsonl", "r.jsonl.0-of-2.vllm-0.log", "r.jsonl.1-of-2.vllm-0.log"}


def test_another_version_does_not_go_on_with_a_file(ask, tmp_path, monkeypatch):
    monkeypatch.setenv("STANDIN_DIES", "20")
    with pytest.raises(SafeEraserError): ask()
    with pytest.raises(SafeEraserError, match="begun with other settings"): ask(python=environment(tmp_path / "new", version="10.0"))
    with pytest.raises(SafeEraserError, match="begun with other settings"): ask(engine_args="--max-model-len 99")


def test_a_server_that_ignores_sigterm_is_killed_with_its_workers(ask, tmp_path, monkeypatch):
    monkeypatch.setenv("STANDIN_DEAF", "1")
    monkeypatch.setattr(bulk, "PATIENCE", .3)
    ask()
    assert len(pids(tmp_path / "diary.jsonl")) == 2 and gone(pids(tmp_path / "diary.jsonl"), 1)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)])
def test_no_server_outlives_a_command_that_is_stopped(tiny, tmp_path, python, monkeypatch, number, code):
    monkeypatch.setenv("STANDIN_SLOW", "600")
    argv = ["safeeraser", "generate", "--model", tiny.model, "--data", tiny.data, "--out", tmp_path / "r.jsonl", "--engine", "vllm", "--python", python]
    streams = [tmp_path / "out", tmp_path / "err"]
    for file in streams: file.touch()
    process = commands._PROCESSES.Process(target=commands._run, args=(commands._MAIN, list(map(str, argv)), None, dict(os.environ), list(map(str, streams))))
    process.start()
    end = time.monotonic() + 60
    while not pids(tmp_path / "diary.jsonl") and time.monotonic() < end: time.sleep(.05)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == code and len(pids(tmp_path / "diary.jsonl")) == 2 and gone(pids(tmp_path / "diary.jsonl"))
    if number == signal.SIGINT: assert "interrupted" in streams[1].read_text()


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    "A run folder whose weights differ from the vanilla model's."
    from safeeraser.trainer import unlearn
    out = tmp_path_factory.mktemp("run") / "gd"
    unlearn(tiny.model, tiny.data, out, "gd", 3, progress=False, max_steps=1, use_cpu=True, lora_r=4, learning_rate=.1, warmup_steps=0)
    return out


@pytest.mark.slow
def test_an_adapter_is_merged_once_and_the_merged_model_goes_when_all_is_answered(ask, run, tiny, tmp_path, monkeypatch):
    from safeeraser.export import merge
    merge(run, tmp_path / "elsewhere", device="cpu")
    folder = bulk.merged_beside(tmp_path / "r.jsonl")
    monkeypatch.setenv("STANDIN_DIES", "20")
    with pytest.raises(SafeEraserError): ask(adapter=run)
    made = (folder / "model.safetensors").stat()
    monkeypatch.delenv("STANDIN_DIES")
    rows = read_rows(ask(adapter=run))
    assert {r["response"].split()[2] for r in rows} == {weights(tmp_path / "elsewhere")} != {weights(tiny.model)}
    assert {(r["method"], r["seed"]) for r in rows} == {("gd", 3)} and not folder.exists()
    assert made.st_mtime_ns < (tmp_path / "r.jsonl").stat().st_mtime_ns
    assert sum(d["what"] == "start" for d in diary(tmp_path / "diary.jsonl")) == 2


def test_a_run_that_cannot_be_merged_is_told_in_the_merger_s_own_sentence(ask, tmp_path):
    with pytest.raises(SafeEraserError, match="adapter_config.json"): ask(adapter=tmp_path)


def test_sglang_is_told_the_chat_template_of_the_model(ask, tiny, tmp_path):
    ask(engine="sglang", python=environment(tmp_path / "sglang", "sglang", "0.5.6"), engine_args="--context-length 4096")
    started, = [d for d in diary(tmp_path / "diary.jsonl") if d["what"] == "start"]
    assert started["argv"][-4:] == ["--chat-template", str(tiny.model / "chat_template.jinja"), "--context-length", "4096"]
    assert {r["decoding"]["engine"] for r in read_rows(tmp_path / "r.jsonl")} == {"sglang 0.5.6 --context-length 4096"}


def test_the_verb_says_what_belongs_together(tiny, tmp_path, python):
    def fails(problem, *more):
        done = command("generate", "--model", tiny.model, "--data", tiny.data, "--out", tmp_path / "r.jsonl", *more)
        assert done.returncode == 2 and problem in done.stderr and done.stderr.count("\n") == 1, done.stderr
    fails("--engine wants --python", "--engine", "vllm")
    fails("--python does nothing without --engine", "--python", python)
    fails("--gpus does nothing without --engine", "--gpus", 2)
    fails("--merge does nothing with --engine", "--engine", "vllm", "--python", python, "--merge", "--adapter", tmp_path)
    fails("--server does nothing with --engine", "--engine", "vllm", "--python", python, "--server", "http://localhost:1/v1")
    fails("one of vllm, sglang", "--engine", "ollama", "--python", python)
    fails("sglang is not installed there; make an environment for it", "--engine", "sglang", "--python", python)
    assert not list(tmp_path.glob("r.jsonl*"))
    done = command("generate", "--model", tiny.model, "--data", tiny.data, "--out", tmp_path / "r.jsonl", "--engine", "vllm", "--python", python)
    assert done.returncode == 0 and json.loads((tmp_path / "r.jsonl").read_text().splitlines()[0])["decoding"]["engine"] == "vllm 9.9.9"
