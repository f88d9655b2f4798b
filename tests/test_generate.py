"""Responses don't depend on the batch, survive a kill, and say what is wrong with a file."""
import json

import pytest
import torch

from safeeraser.core import SafeEraserError
from safeeraser.data import load_sets
from safeeraser.generate import answer_batch, generate, plan_requests, RowSampler
from safeeraser.rows import read_rows, ROW_KEYS
from safeeraser.model import add_adapter
from safeeraser.trainer import unlearn
from safeeraser.tiny_llava import BaseConfig, build_model


def test_greedy_at_batch_1_and_16(sharp, tiny):
    items = [*load_sets(tiny.data, "val")][:16]
    together = answer_batch(*sharp, items, 8)
    assert len(set(together)) > 5
    assert together == [answer_batch(*sharp, [i], 8)[0] for i in items]


def test_greedy_is_the_argmax_of_plain_forward_passes(sharp, tiny):
    model, encoder = sharp
    item, tok = load_sets(tiny.data, "val").forget[0], encoder.processor.tokenizer
    inputs = encoder.prompts([item])
    with torch.no_grad():
        for _ in range(8):
            following = model(**inputs).logits[:, -1:].argmax(-1)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], following], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            if following == tok.eos_token_id: break
    start = encoder.prompts([item])["input_ids"].shape[1]
    assert answer_batch(model, encoder, [item], 8) == [tok.decode(inputs["input_ids"][0, start:], skip_special_tokens=True).strip()]


def test_samples_follow_the_model_s_distribution(sharp, tiny):
    model, encoder = sharp
    item = load_sets(tiny.data, "val").forget[0]
    with torch.no_grad(): p = model(**encoder.prompts([item])).logits[0, -1].softmax(-1)
    n = 6000
    drawn = RowSampler(range(n), 1.0, 1.0)(torch.empty(n, 0), p.log().expand(n, -1)).argmax(-1).bincount(minlength=len(p)) / n
    assert (drawn - p).abs().max() < 4 * (.25 / n) ** .5


def test_sampling_row_by_row(tiny, tmp_path):
    files = [generate(tiny.model, tiny.data, tmp_path / f"{b}.jsonl", samples=3, temperature=1.0, batch_size=b, seed=5, progress=False) for b in (1, 7)]
    assert files[0].read_bytes() == files[1].read_bytes()
    rows = read_rows(files[0])
    assert len({r["response"] for r in rows}) > len(rows) / 2
    other = generate(tiny.model, tiny.data, tmp_path / "o.jsonl", samples=3, temperature=1.0, batch_size=7, seed=6, progress=False)
    assert other.read_bytes() != files[0].read_bytes()


def test_every_question_once(tiny, tmp_path):
    rows = read_rows(generate(tiny.model, tiny.data, tmp_path / "r.jsonl", progress=False))
    train, val, held_out = (load_sets(tiny.data, s) for s in ("train", "val", "held_out"))
    assert len(rows) == len(train.forget) + len([*val]) + len(held_out.decouple)
    assert set(ROW_KEYS) <= set(rows[0]) and all(r["method"] == "base" and r["schema_version"] == 1 for r in rows)
    assert {(r["split"], r["set"]) for r in rows} == {("train", "forget"), ("val", "forget"), ("val", "retain"), ("val", "decouple"), ("held_out", "decouple")}


KILLED = """
import os, signal, sys
import safeeraser.generate as g
plain, calls = g.answer_batch, iter(range(99))
def answer_batch(*a):
    if next(calls) == int(sys.argv[4]): os.kill(os.getpid(), signal.SIGKILL)
    return plain(*a)
g.answer_batch = answer_batch
g.generate(sys.argv[1], sys.argv[2], sys.argv[3], batch_size=8, progress=False)
"""


def test_killed_runs_go_on_to_the_same_file(tiny, tmp_path, run_python):
    whole = generate(tiny.model, tiny.data, tmp_path / "whole.jsonl", progress=False).read_bytes()
    out = tmp_path / "out.jsonl"
    for batch in (1, 2):
        assert run_python(KILLED, tiny.model, tiny.data, out, batch).returncode == -9
        assert not out.exists()
        part = tmp_path / "out.jsonl.part"
        part.write_text(part.read_text()[:-15])  # cut off in the middle of a line
    generate(tiny.model, tiny.data, out, batch_size=8, progress=False)
    assert out.read_bytes() == whole and sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "whole.jsonl"]


def test_an_adapter_s_answers_are_its_own(tiny, tmp_path):
    unlearn(tiny.model, tiny.data, tmp_path / "run", "ga", seed=4, progress=False, max_steps=4, learning_rate=.05, use_cpu=True, save_strategy="no")
    plain = read_rows(generate(tiny.model, tiny.data, tmp_path / "a.jsonl", progress=False))
    adapted = read_rows(generate(tiny.model, tiny.data, tmp_path / "b.jsonl", tmp_path / "run", progress=False))
    assert {(r["method"], r["seed"]) for r in adapted} == {("ga", 4)}
    assert [r["response"] for r in plain] != [r["response"] for r in adapted]


def test_an_adapter_of_another_model_is_refused(tiny, tmp_path):
    other, processor = build_model(BaseConfig(width=64, vision_width=32))
    add_adapter(other, 4, 8, 0.0).save_pretrained(tmp_path / "run")
    with pytest.raises(SafeEraserError, match="does not fit this model"):
        generate(tiny.model, tiny.data, tmp_path / "r.jsonl", tmp_path / "run", progress=False)


@pytest.mark.parametrize("text, problem", [
    ("", "holds no response"), ("{}\n", "line 1: lacks schema_version"), ("nonsense\n", "line 1: not a JSON object"), ("[1]\n", "line 1: lacks")])
def test_bad_files_are_named(text, problem, tmp_path):
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(SafeEraserError, match=f"r.jsonl.*{problem}"): read_rows(tmp_path / "r.jsonl")


def test_another_schema_and_a_cut_line(tiny, tmp_path):
    row = {k: 0 for k in ROW_KEYS} | {"schema_version": 99}
    (tmp_path / "r.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(SafeEraserError, match="schema version 99"): read_rows(tmp_path / "r.jsonl")
    whole = json.dumps(row | {"schema_version": 1})
    (tmp_path / "r.jsonl").write_text(whole + "\n" + whole[:40])
    with pytest.raises(SafeEraserError, match="line 2: not a JSON object"): read_rows(tmp_path / "r.jsonl")


def test_greedy_samples_are_refused(tiny, tmp_path):
    with pytest.raises(SafeEraserError, match="set temperature"):
        generate(tiny.model, tiny.data, tmp_path / "r.jsonl", samples=3)


def test_plan_is_in_a_fixed_order(tiny):
    assert plan_requests(tiny.data) == plan_requests(tiny.data)
