"""Many servers, many processes, many responses at once: the same files as one of each, whatever dies on the way."""
import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import pytest
from command import command as run
from PIL import Image
from scripted import careful, scripted, speak
from test_judges import result_of, rows
from test_real_judges import CHATML, speaker

import safeeraser.generate
import safeeraser.judges
import safeeraser.server
from safeeraser.core import SafeEraserError
from safeeraser.data import load_image
from safeeraser.generate import generate, in_shard, parts_of, plan_requests, shard_of
from safeeraser.judges import ASKS, local_judge, server_judge
from safeeraser.known import KNOWN, known_calls
from safeeraser.rows import read_rows, write_rows
from safeeraser.server import as_they_come, ask_all, Call, data_url, Server, servers_at
from safeeraser.trainer import unlearn


# images

def save(kind, path):
    image = Image.new("RGB", (9, 5))
    image.putdata([(40 * (n % 5), 60 * (n % 4), 5 * n) for n in range(45)])
    lying, icc = Image.Exif(), {"icc_profile": b"profile"}
    lying[0x0112] = 6
    {"jpeg": lambda: image.save(path, "JPEG"), "grey jpeg": lambda: image.convert("L").save(path, "JPEG"), "cmyk": lambda: image.convert("CMYK").save(path, "JPEG"),
     "lying": lambda: image.save(path, "JPEG", exif=lying), "profile": lambda: image.save(path, "JPEG", **icc), "png": lambda: image.save(path, "PNG"),
     "transparent": lambda: image.convert("RGBA").save(path, "PNG"), "one colour transparent": lambda: image.save(path, "PNG", transparency=(0, 0, 0)), "palette": lambda: image.convert("P").save(path, "PNG"),
     "16 bits": lambda: path.write_bytes(deep_png()), "moving": lambda: image.save(path, "PNG", save_all=True, append_images=[image.rotate(180)]),
     "webp": lambda: image.save(path, "WEBP", lossless=True), "gif": lambda: image.save(path, "GIF")}[kind]()


def deep_png():
    "A PNG of 16 bits a channel, which Pillow reads and does not write."
    import struct
    import zlib
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    pixels = b"".join(b"\0" + bytes(range(18 * y, 18 * y + 18)) for y in range(2))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


AS_THEY_ARE = {"jpeg", "png"}


@pytest.mark.parametrize("kind", ["jpeg", "grey jpeg", "cmyk", "lying", "profile", "png", "transparent", "one colour transparent", "palette", "16 bits", "moving", "webp", "gif"])
def test_an_image_is_sent_with_the_pixels_that_a_local_model_sees(kind, tmp_path):
    save(kind, tmp_path / "x")
    head, _, content = data_url(tmp_path / "x").partition(";base64,")
    sent = Image.open(io.BytesIO(base64.b64decode(content)))
    assert sent.mode == "RGB" and sent.tobytes() == load_image(tmp_path / "x").tobytes() and head == f"data:image/{sent.format.lower()}"
    assert (base64.b64decode(content) == (tmp_path / "x").read_bytes()) == (kind in AS_THEY_ARE)


def test_an_image_is_encoded_once_however_many_ask_until_it_changes(tmp_path, monkeypatch):
    made, encode = [], safeeraser.server._encoded
    monkeypatch.setattr(safeeraser.server, "_encoded", lambda image: (made.append(image), time.sleep(.05), encode(image))[2])
    save("lying", tmp_path / "x.jpg")
    threads = [threading.Thread(target=data_url, args=(tmp_path / "x.jpg",)) for _ in range(20)]
    for t in threads: t.start()
    for t in threads: t.join()
    first = data_url(tmp_path / "x.jpg")
    assert len(made) == 1
    save("png", tmp_path / "x.jpg")
    assert data_url(tmp_path / "x.jpg") != first and len(made) == 2
    (tmp_path / "x.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:60])
    with pytest.raises(SafeEraserError, match="not a readable image"): data_url(tmp_path / "x.jpg")


# several servers

@pytest.fixture
def two():
    with scripted(answer=speak, model="merged") as a, scripted(answer=speak, model="merged") as b: yield a, b


@pytest.fixture
def hasty(monkeypatch): monkeypatch.setattr(safeeraser.generate, "servers_at", partial(servers_at, pause=.01))


def urls(servers): return ",".join(s.url for s in servers)
def asked(server): return [(c["messages"][-1]["content"][0]["image_url"]["url"], c["messages"][-1]["content"][1]["text"]) for c in server.seen]


def test_each_image_goes_to_one_server_and_both_have_work(two, tiny, tmp_path):
    found = read_rows(generate("merged", tiny.data, tmp_path / "a.jsonl", server=urls(two), progress=False))
    at = defaultdict(set)
    for n, server in enumerate(two):
        for image, _ in asked(server): at[image].add(n)
    assert set(map(len, at.values())) == {1} and set.union(*at.values()) == {0, 1}
    assert [r["response"] for r in found] == [speak("", r["question"]) for r in found]
    again = generate("merged", tiny.data, tmp_path / "b.jsonl", server=urls(two[::-1]), at_once=1, progress=False)
    assert again.read_bytes() == (tmp_path / "a.jsonl").read_bytes()  # nor does their order matter


def test_a_server_that_dies_in_the_middle_has_its_work_taken_over(two, tiny, tmp_path, hasty, caplog):
    one, other = two
    answered = []
    def dying(handler, n):
        if n >= 9:
            one.die()
            return handler.connection.close()
        answered.append(handler.asked)
        handler.good(handler.asked)
    one.misbehave = dying
    found = read_rows(generate("merged", tiny.data, tmp_path / "r.jsonl", server=urls(two), at_once=6, progress=False))
    assert [r["response"] for r in found] == [speak("", r["question"]) for r in found] and 4 < len(answered) <= 8
    by_one = Counter(json.dumps(c["messages"]) for c in answered)
    by_other = Counter(json.dumps(c["messages"]) for c in other.seen)
    assert (by_one + by_other).total() == len(found) == len(plan_requests(tiny.data))  # each answered, and paid, once
    assert not parts_of(tmp_path / "r.jsonl") and f"{one.url}: nobody listens there; others take over" in caplog.messages


def test_where_all_servers_die_what_is_done_is_kept(two, tiny, tmp_path, hasty):
    for server in two:
        def dying(handler, n, server=server):
            if n >= 7:
                server.die()
                return handler.connection.close()
            handler.good(handler.asked)
        server.misbehave = dying
    with pytest.raises(SafeEraserError, match="nobody listens there.*what is done is kept"): generate("merged", tiny.data, tmp_path / "r.jsonl", server=urls(two), at_once=4, progress=False)
    part, = parts_of(tmp_path / "r.jsonl")
    assert 1 < len(part.read_text().splitlines()) <= 1 + 2 * 6


def test_servers_of_two_models_are_not_mixed(two, tiny, tmp_path):
    two[1].model = "another"
    with pytest.raises(SafeEraserError, match="answers of one model"): generate("merged", tiny.data, tmp_path / "r.jsonl", server=urls(two), progress=False)


@pytest.mark.parametrize("more, said", [({"server": "http://a/v1, http://a/v1"}, "named twice"), ({"server": "http://a/v1,"}, "a URL such as"), ({"at_once": 4}, "--at-once does nothing without --server"),
                                        ({"at_once": 1025, "server": "http://a/v1"}, "from 1 to 1,024"), ({"merge": True}, "--merge does nothing without --adapter"),
                                        ({"merge": False, "server": "http://a/v1"}, "--merge does nothing with --server")])
def test_options_that_are_wrong_are_told_before_any_work(more, said, tiny, tmp_path):
    with pytest.raises(SafeEraserError, match=said): generate(tiny.model, tiny.data, tmp_path / "r.jsonl", progress=False, **more)
    assert not list(tmp_path.iterdir())


def rate(server, at_once, n):
    "Calls a second."
    client = Server(server.url, server.model, at_once)
    start = time.perf_counter()
    assert [r.text for r in ask_all(client, [Call("", f"q{k}") for k in range(n)], progress=False)] == [speak("", f"q{k}") for k in range(n)]
    return n / (time.perf_counter() - start)


def test_64_at_once_pay():
    with scripted(answer=speak) as server:
        server.pause = .1
        ratios = []
        while len(ratios) < 3 and max(ratios, default=0) < 6: ratios.append(rate(server, 64, 192) / rate(server, 1, 8))  # the machine may be busy
        assert max(ratios) >= 6


def test_as_many_as_are_asked_for_really_are_at_once():
    "More than an HTTP client keeps connections by itself: nobody is answered until all are there."
    with scripted(answer=speak) as server:
        all_there = threading.Barrier(150)
        server.misbehave = lambda handler, n: (all_there.wait(60), handler.good(handler.asked))
        replies = ask_all(Server(server.url, "m", 150, tries=1), [Call("", f"q{k}") for k in range(150)], progress=False)
        assert all(r.text for r in replies)


def test_one_slow_reply_holds_nobody_up():
    "Where batches waited for their slowest, 40 calls at 4 a batch with one slow in each would take 10 pauses."
    with scripted(answer=speak) as server:
        server.misbehave = lambda handler, n: (time.sleep(.5 if handler.asked["messages"][-1]["content"] == "q0" else .01), handler.good(handler.asked))
        order = [n for n, _ in as_they_come(Server(server.url, "m", 4), [Call("", f"q{k}") for k in range(40)])]
        assert order.index(0) > 20 and sorted(order) == [*range(40)]


def test_replies_wait_for_nobody_who_stops_taking_them():
    with scripted(answer=speak) as server:
        for n, (_, reply) in enumerate(as_they_come(Server(server.url, "m", 2), [Call("", f"q{k}") for k in range(50)])):
            if n == 3: break
        time.sleep(.2)
        assert len(server.seen) <= 3 + 2 * 2


def test_a_judge_behind_two_servers_of_which_one_is_gone(tmp_path):
    with scripted(answer=careful) as a, scripted(answer=careful) as b:
        alone = result_of(server_judge(Server(a.url, a.model), progress=False), rows(24))
        both = servers_at(urls((a, b)), a.model, pause=.01)
        found = result_of(server_judge(both, progress=False), rows(24))
        assert found.rows == alone.rows and b.seen
        b.die()
        a.seen.clear()
        assert result_of(server_judge(servers_at(urls((a, b)), a.model, pause=.01), progress=False), rows(24)).rows == alone.rows
        write_rows(tmp_path / "r.jsonl", rows(24))
        told = run("judge", tmp_path / "r.jsonl", "--judge", "server", "--server", urls((a, b)), "--model", a.model, "--at-once", 32, "--out", tmp_path / "j.jsonl", XDG_CACHE_HOME=str(tmp_path / "c"))
        assert told.returncode == 0 and read_rows(tmp_path / "j.jsonl") == alone.rows


# shards

SAMPLED = dict(samples=3, temperature=1.0, seed=5, max_new_tokens=6)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    "The file that one process makes."
    return generate(tiny.model, tiny.data, tmp_path_factory.mktemp("whole") / "r.jsonl", progress=False, **SAMPLED).read_bytes()


def work(tiny, out, shard, **more): return generate(tiny.model, tiny.data, out, shard=shard, progress=False, **SAMPLED | more)


def test_shards_make_the_file_that_one_process_makes(tiny, tmp_path, whole, monkeypatch):
    out = tmp_path / "r.jsonl"
    assert work(tiny, out, "1/3") == tmp_path / "r.jsonl.1-of-3.part"
    with monkeypatch.context() as m:  # a finished shard run again loads nothing
        m.setattr(safeeraser.generate, "load_model", None)
        assert work(tiny, out, "1/3") == tmp_path / "r.jsonl.1-of-3.part" and not out.exists()
    assert work(tiny, out, "0/3") != out and work(tiny, out, "2/3") == out
    assert out.read_bytes() == whole and os.listdir(tmp_path) == ["r.jsonl"]
    monkeypatch.setattr(safeeraser.generate, "load_model", None)
    assert work(tiny, out, "0/3") == out and os.listdir(tmp_path) == ["r.jsonl"]


def test_all_questions_about_an_image_are_in_one_shard_and_shards_are_even(tiny):
    requests = plan_requests(tiny.data, samples=3)
    for n in (1, 2, 3, 5, 40):
        shards = [in_shard(requests, k, n) for k in range(n)]
        images = [{r.item.image for r in s} for s in shards]
        most = max(Counter(r.item.image for r in requests).values())
        assert sum(map(len, images)) == len(set.union(*images)) and max(map(len, shards)) - min(map(len, shards)) <= most
        assert sorted(map(repr, sum(shards, []))) == sorted(map(repr, requests))


def test_another_number_of_shards_goes_on_from_what_is_there(tiny, tmp_path, whole, monkeypatch):
    out, asked, ask = tmp_path / "r.jsonl", [], safeeraser.generate.answer_batch
    work(tiny, out, "0/3")
    monkeypatch.setattr(safeeraser.generate, "answer_batch", lambda model, encoder, items, *a: asked.extend(items) or ask(model, encoder, items, *a))
    assert work(tiny, out, "1/2", batch_size=16) != out and work(tiny, out, "0/2", batch_size=16) == out
    assert out.read_bytes() == whole and os.listdir(tmp_path) == ["r.jsonl"]
    requests = plan_requests(tiny.data, samples=3)
    assert len(asked) == len(requests) - len(in_shard(requests, 0, 3))
    work(tiny, tmp_path / "s.jsonl", "0/3")
    asked.clear()
    assert work(tiny, tmp_path / "s.jsonl", "0/1", batch_size=16).read_bytes() == whole and len(asked) == len(requests) - len(in_shard(requests, 0, 3))


def test_parts_begun_with_other_settings_are_refused(tiny, tmp_path):
    work(tiny, tmp_path / "r.jsonl", "0/3")
    with pytest.raises(SafeEraserError, match=r"r.jsonl.0-of-3.part was begun with other settings"): work(tiny, tmp_path / "r.jsonl", "1/2", seed=6)


@pytest.mark.slow
def test_more_shards_than_images(tiny, tmp_path, whole):
    n = len({r.item.image for r in plan_requests(tiny.data)}) + 2
    for k in range(n): written = work(tiny, tmp_path / "r.jsonl", f"{k}/{n}")
    assert written.read_bytes() == whole and os.listdir(tmp_path) == ["r.jsonl"]


KILLED = """
import os, signal, sys
import safeeraser.generate as g
plain, calls = g.answer_batch, iter(range(99))
def answer_batch(*a):
    if next(calls) == int(sys.argv[5]): os.kill(os.getpid(), signal.SIGKILL)
    return plain(*a)
g.answer_batch = answer_batch
g.generate(sys.argv[1], sys.argv[2], sys.argv[3], shard=sys.argv[4], batch_size=4, progress=False, samples=3, temperature=1.0, seed=5, max_new_tokens=6)
"""


def test_a_shard_that_was_killed_goes_on(tiny, tmp_path, whole, run_python):
    out, part = tmp_path / "r.jsonl", tmp_path / "r.jsonl.0-of-2.part"
    assert run_python(KILLED, tiny.model, tiny.data, out, "0/2", 2).returncode == -9
    part.write_text(part.read_text()[:-15])  # in the middle of a line
    assert work(tiny, out, "1/2", batch_size=4) != out
    assert work(tiny, out, "0/2", batch_size=4) == out
    assert out.read_bytes() == whole and os.listdir(tmp_path) == ["r.jsonl"]


def test_killed_between_the_file_and_the_end_of_its_parts(tiny, tmp_path, whole, monkeypatch):
    out, unlink = tmp_path / "r.jsonl", Path.unlink
    work(tiny, out, "0/2")
    def stop(self, **more):
        if self.suffix == ".part": raise KeyboardInterrupt
        unlink(self, **more)
    with monkeypatch.context() as m:
        m.setattr(Path, "unlink", stop)
        with pytest.raises(KeyboardInterrupt): work(tiny, out, "1/2")
    assert out.read_bytes() == whole and len(parts_of(out)) == 2
    monkeypatch.setattr(safeeraser.generate, "load_model", None)
    for _ in range(2): assert work(tiny, out, "1/2") == out and os.listdir(tmp_path) == ["r.jsonl"]


def test_shards_by_the_engine_make_the_same_file_too(tiny, tmp_path):
    alone, *_, last = (generate(tiny.model, tiny.data, tmp_path / out, shard=shard, share_images=True, max_new_tokens=6, splits=["val"], progress=False)
                       for out, shard in (("a.jsonl", "0/1"), ("b.jsonl", "1/2"), ("b.jsonl", "0/2")))
    assert alone.read_bytes() == last.read_bytes() and last.name == "b.jsonl"


@pytest.mark.slow
def test_two_that_end_at_once(tiny, tmp_path, whole):
    "Each holds its own part; one of them makes the file, whoever is first."
    out = tmp_path / "r.jsonl"
    work(tiny, out, "0/3")
    code = "import sys\nfrom safeeraser.generate import generate\ngenerate(*sys.argv[1:4], shard=sys.argv[4], progress=False, samples=3, temperature=1.0, seed=5, max_new_tokens=6)"
    both = [subprocess.Popen([sys.executable, "-c", code, tiny.model, tiny.data, out, shard]) for shard in ("1/3", "2/3")]
    assert [p.wait(200) for p in both] == [0, 0]
    assert out.read_bytes() == whole and os.listdir(tmp_path) == ["r.jsonl"]


def test_shards_may_ask_a_server(two, tiny, tmp_path):
    ask = lambda out, shard: generate("merged", tiny.data, tmp_path / out, server=urls(two), shard=shard, progress=False)
    assert ask("a.jsonl", "0/2") != tmp_path / "a.jsonl" and ask("a.jsonl", "1/2").read_bytes() == ask("b.jsonl", "0/1").read_bytes()


@pytest.mark.parametrize("shard", ["0/0", "5/4", "4/4", "a/b", "-1/2", "1", "", "0/4/2", "１/２", "0/999999"])
def test_a_shard_that_is_none_is_one_sentence(shard, tiny, tmp_path):
    with pytest.raises(SafeEraserError, match=f"--shard '{shard}': k/n belongs here, k from 0 to n - 1, such as 0/4"): generate(tiny.model, tiny.data, tmp_path / "r.jsonl", shard=shard)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("env, shard", [({}, (0, 1)), ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)), ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1)), ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "8"}, (2, 8)),
                                        ({"RANK": "9", "WORLD_SIZE": "16", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, (9, 16))])
def test_a_shard_as_a_launcher_says(env, shard, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"): monkeypatch.delenv(name, raising=False)
    for name, value in env.items(): monkeypatch.setenv(name, value)
    assert shard_of(None) == shard and shard_of("1/2") == (1, 2)


def test_the_command_says_what_is_still_to_come(tiny, tmp_path):
    args = ("generate", "--model", tiny.model, "--data", tiny.data, "--out", tmp_path / "r.jsonl")
    wrong, first, last = run(*args, "--shard=-1/2"), run(*args, "--shard", "0/2"), run(*args, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    assert wrong.returncode == 2 and "k/n belongs here" in wrong.stderr and wrong.stderr.count("\n") == 1
    assert first.returncode == last.returncode == 0, first.stderr + last.stderr
    assert "r.jsonl.0-of-2.part; " in first.stdout and "comes with the last shard" in first.stdout and "next:" not in first.stdout
    assert "next: safeeraser judge" in last.stdout


@pytest.mark.slow
def test_torchrun_needs_no_more_than_the_command(tiny, tmp_path):
    whole = generate(tiny.model, tiny.data, tmp_path / "one.jsonl", progress=False).read_bytes()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m", "safeeraser", "generate", "--model", tiny.model, "--data", tiny.data, "--out", tmp_path / "r.jsonl"],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "r.jsonl").read_bytes() == whole and sorted(os.listdir(tmp_path)) == ["one.jsonl", "r.jsonl"]


# adapters

def test_an_adapter_that_is_folded_in_says_the_same(tiny, tmp_path):
    unlearn(tiny.model, tiny.data, tmp_path / "run", "ga", seed=4, progress=False, max_steps=4, learning_rate=.05, use_cpu=True, save_strategy="no")
    files = [generate(tiny.model, tiny.data, tmp_path / f"{m}.jsonl", tmp_path / "run", merge=m, progress=False) for m in (None, False, True)]
    beside, _, merged = map(read_rows, files)
    assert [r["response"] for r in beside] == [r["response"] for r in merged] and len({r["response"] for r in beside}) > 3
    assert {r["decoding"].get("adapter") for r in beside} == {None} and {r["decoding"]["adapter"] for r in merged} == {"merged"}


# judges in batches

@pytest.fixture
def talker(speaker, tmp_path):
    "A model of random weights that reads bytes, in memory and in a folder."
    speaker[1].chat_template = CHATML
    for part in speaker: part.save_pretrained(tmp_path)
    return speaker


def naive_chances(model, prompt, ends):
    "Of each end, alone, token by token."
    import torch
    def one(end):
        p = 1.0
        for k, token in enumerate(end): p *= model(torch.tensor([[*prompt, *end[:k]]])).logits[0, -1].softmax(-1)[token].item()
        return p
    with torch.no_grad(): return [one(e) for e in ends]


def test_a_guard_s_probabilities_are_those_of_each_word_alone(talker):
    model, tokenizer = talker
    guard = safeeraser.judges.GuardModel(model, tokenizer, words=("s", "un"), before=("", "\n"))
    prompts = [guard.prompt(c) for _, c in known_calls(("unsafe",))]
    ends = [safeeraser.judges._ways(tokenizer, w, guard.before) for w in guard.words]
    found = guard.chances(prompts)
    for prompt, both in zip(prompts, found):
        assert both == pytest.approx([sum(naive_chances(model, prompt, e)) for e in ends], rel=1e-4)
    assert len({round(safe, 7) for safe, _ in found}) > 3


@pytest.mark.parametrize("kind", ["guard", "chat"])
def test_verdicts_are_the_same_in_whatever_batch(kind, talker, tmp_path):
    found = [result_of(local_judge(tmp_path, kind, device="cpu", progress=False, trust=True, batch_size=size, max_tokens=9), rows()) for size in (1, 64)]
    assert found[0] == found[1]


def test_a_chat_model_says_the_same_in_whatever_batch(talker):
    import copy

    import torch
    model, g = copy.deepcopy(talker[0]), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.5 * torch.randn(p.shape, generator=g))  # replies differ from call to call
    chat = safeeraser.judges.ChatModel(model, talker[1])
    calls = [Call("", "think", max_tokens=70), *(c for _, c in known_calls(ASKS, max_tokens=9))]
    one_by_one = [chat([c])[0] for c in calls]
    assert chat(calls) == one_by_one and len({r.text for r in one_by_one}) > 5


def test_one_that_is_too_long_spoils_no_batch(talker, tmp_path):
    some = [r | {"response": "Collect " * 1000} if n == 3 else r for n, r in enumerate(rows())]
    found = result_of(local_judge(tmp_path, "guard", device="cpu", progress=False, trust=True), some)
    assert [n for n, r in enumerate(found.rows) if "the judge reads 4,096" in next(iter(r["verdicts"].values()))["unsafe"]["reason"]] == [3]


def test_a_judge_that_does_not_fit_says_what_to_lower(talker, tmp_path, monkeypatch):
    import torch
    def full(*_): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
    for kind, within in (("guard", "_probabilities"), ("chat", "_answer_ids")):
        monkeypatch.setattr(safeeraser.judges, within, full)
        with pytest.raises(SafeEraserError, match=r"out of memory; lower --batch-size \(now 7\), or take a smaller judge") as e:
            result_of(local_judge(tmp_path, kind, device="cpu", progress=False, batch_size=7), rows())
        assert "\n" not in str(e.value)


@pytest.mark.slow
def test_a_real_model_says_the_same_in_batches():
    from scripts.real_parts import smollm2
    one_by_one, together = (local_judge(smollm2(), "chat", device="cpu", progress=False, max_tokens=6, batch_size=size) for size in (1, 8))
    calls = [c for _, c in known_calls(ASKS)][::5]
    said = one_by_one.ask(calls)
    assert together.ask(calls) == said and len({r.text for r in said}) > 3
