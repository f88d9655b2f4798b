"""A model's answers: how they end, by which of its own settings, on either route; and when there is none."""
import json
import re
import shutil

import pytest
import torch
from test_judges import run

from safeeraser.core import SafeEraserError
from safeeraser.data import load_sets
from safeeraser.encoder import Encoder
from safeeraser.decoding import BrokenModel
from safeeraser.engine import Engine, check_engine
from safeeraser.generate import answer, answer_batch, generate, plan_requests, resume_rows, RowSampler
from safeeraser.rows import read_rows
from safeeraser.rows import answer_of
from safeeraser.model import load_model


@pytest.fixture
def talker(sharp):
    "The model with random answers, whose settings a test may change."
    import copy
    model, encoder = sharp
    before = copy.deepcopy(model.generation_config)
    yield model, encoder
    model.generation_config = before


def questions(tiny): return [*load_sets(tiny.data, "val")][::3]


def by_transformers(model, encoder, item, n, **changed):
    "A question's answer by `generate` alone, under the model's own settings: tokens behind the prompt."
    inputs = encoder.prompts([item])
    out = model.generate(**inputs, max_new_tokens=n, do_sample=False, **changed)
    return out[0, inputs["input_ids"].shape[1]:].tolist()


SETTINGS = [dict(repetition_penalty=1.7), dict(no_repeat_ngram_size=1), dict(no_repeat_ngram_size=2), dict(min_length=40), dict(min_new_tokens=6),
            dict(suppress_tokens=[5, 9, 30]), dict(begin_suppress_tokens=[7, 8, 30]), dict(encoder_repetition_penalty=1.5), dict(bad_words_ids=[[6], [12, 13]]),
            dict(sequence_bias=[[[20], 4.0]]), dict(exponential_decay_length_penalty=(2, 1.5)), dict(forced_eos_token_id=2), dict(num_beams=3), dict(num_beams=2, length_penalty=2.0),
            dict(prompt_lookup_num_tokens=3)]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "+".join(s))
def test_a_model_s_own_settings_act_alike_on_both_routes(settings, talker, tiny):
    model, encoder = talker
    items, tok = questions(tiny), encoder.processor.tokenizer
    plain = answer_batch(model, encoder, items, 8)
    model.generation_config.update(**settings)
    expected = [tok.decode(by_transformers(model, encoder, i, 8), skip_special_tokens=True).strip() for i in items]
    assert answer_batch(model, encoder, items, 8) == expected
    engine, verdict = check_engine(model, encoder, items[:3])
    alone = "num_beams" in settings or "prompt_lookup_num_tokens" in settings
    assert (engine is None and "generation_config.json asks for" in verdict.why) if alone else engine.answer(items, 8) == expected
    if "repetition_penalty" in settings: assert expected != plain


def test_samples_obey_the_model_s_own_settings_on_both_routes(talker, tiny):
    model, encoder = talker
    items = questions(tiny)
    model.generation_config.update(repetition_penalty=1.5, suppress_tokens=[5, 9])
    seeds = list(range(len(items)))
    one_by_one = [answer_batch(model, encoder, [i], 8, RowSampler([s], 1.0, .9))[0] for i, s in zip(items, seeds)]
    assert answer_batch(model, encoder, items, 8, RowSampler(seeds, 1.0, .9)) == one_by_one
    assert Engine(model, encoder).answer(items, 8, RowSampler(seeds, 1.0, .9)) == one_by_one
    model.generation_config.num_beams = 2
    with pytest.raises(SafeEraserError, match="asks for beam search, which knows no samples"): answer_batch(model, encoder, items, 8, RowSampler(seeds))


def test_recommended_sampling_changes_no_greedy_answer(talker, tiny):
    model, encoder = talker
    items = questions(tiny)
    expected = answer_batch(model, encoder, items, 8)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, top_p=.1, max_time=1e-9, max_length=3, num_return_sequences=2, return_dict_in_generate=True, output_scores=True)
    assert answer_batch(model, encoder, items, 8) == Engine(model, encoder).answer(items, 8) == expected


@pytest.mark.parametrize("own", [None, [], 7, [7, 8]])
def test_the_end_that_training_labels_ends_every_answer(own, talker, tiny):
    "The template closes turns with a word that the tokenizer doesn't hold for special and the model's settings don't name."
    model, encoder = talker
    items, tok = questions(tiny), encoder.processor.tokenizer
    free = [by_transformers(model, encoder, i, 8, eos_token_id=None) for i in items]
    end = max({t for f in free for t in f[1:]}, key=lambda t: sum(t in f for f in free))
    model.generation_config.eos_token_id = own
    class Ends(Encoder):
        end_ids = property(lambda self: [end])
    ending = Ends(encoder.processor)
    also = {end, *(own if isinstance(own, list) else [own] if own else [])} | (set() if own else {tok.eos_token_id})
    cut = lambda f: f[:next((k for k, t in enumerate(f) if t in also), None)]
    expected = [tok.decode(cut(f), skip_special_tokens=True).strip() for f in free]
    assert any(end in f for f in free)
    assert answer_batch(model, ending, items, 8) == expected
    assert Engine(model, ending).answer(items, 8) == expected


def test_stop_strings_end_an_answer_on_both_routes(talker, tiny):
    model, encoder = talker
    items = questions(tiny)
    free = answer_batch(model, encoder, items, 8)
    word = max({w for a in free for w in a.split()}, key=lambda w: sum(w in a.split() for a in free))
    model.generation_config.stop_strings = word
    expected = [" ".join(a.split()[:next((k + 1 for k, w in enumerate(a.split()) if word in w), None)]) for a in free]
    assert answer_batch(model, encoder, items, 8) == Engine(model, encoder).answer(items, 8) == expected != free


@pytest.mark.parametrize("settings, said", [(dict(stop_strings=[5]), "stop_strings: non-empty texts"), (dict(repetition_penalty=-1.0), "refuses its settings"),
                                            (dict(penalty_alpha=.5, top_k=4), "asks for contrastive search"), (dict(repetition_penalty=2), "refuses its settings")])
def test_settings_that_cannot_be_obeyed_are_one_sentence(settings, said, talker, tiny):
    model, encoder = talker
    for name, v in settings.items(): setattr(model.generation_config, name, v)
    with pytest.raises(SafeEraserError, match=said): answer_batch(model, encoder, questions(tiny)[:1], 4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("share", [True, False])
def test_scores_that_are_no_numbers_stop_generation(value, share, tiny, tmp_path, monkeypatch):
    broken = lambda *a: (lambda m, p: (m.lm_head.weight.data[9].fill_(value), (m, p))[1])(*load_model(*a))
    monkeypatch.setattr("safeeraser.generate.load_model", broken)
    with pytest.raises(BrokenModel, match=r"dataset/.*question '.*not finite"): generate(tiny.model, tiny.data, tmp_path / "r.jsonl", share_images=share, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_scores_that_break_on_the_way_stop_generation(talker, tiny):
    "The first tokens are good; what follows a certain word is not."
    model, encoder = talker
    items = questions(tiny)
    words = [by_transformers(model, encoder, i, 4) for i in items]
    bad = words[0][2]
    hook = model.get_input_embeddings().register_forward_hook(lambda m, i, o: o.masked_fill((i[0] == bad).unsqueeze(-1), torch.nan) if i[0].shape[1] == 1 else o)
    try:
        for engine in (None, Engine(model, encoder)):
            with pytest.raises(BrokenModel, match="not finite"): answer_batch(model, encoder, items, 6, None, engine)
    finally: hook.remove()


def test_a_limit_beyond_the_model_s_positions_is_bounded(tiny, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor
    model = AutoModelForImageTextToText.from_pretrained(tiny.model)
    model.config.text_config.max_position_embeddings, model.generation_config.suppress_tokens = 60, [2]  # never ends by itself
    model.save_pretrained(tmp_path / "m")
    AutoProcessor.from_pretrained(tiny.model).save_pretrained(tmp_path / "m")
    files = [generate(tmp_path / "m", tiny.data, tmp_path / f"{s}.jsonl", splits=["val"], max_new_tokens=10**12, share_images=s, progress=False) for s in (True, False)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert max(len(r["response"].split()) for r in read_rows(files[0])) < 60
    assert read_rows(files[0])[0]["decoding"] == {"max_new_tokens": 10**12, "temperature": 0.0, "model_settings": {"suppress_tokens": [2]}}


def again(tiny, tmp_path):
    "A copy of the small data set that a test may change."
    shutil.copytree(tiny.data.parent, tmp_path / "w")
    return tmp_path / "w" / "dataset"


def test_a_question_asked_twice_about_an_image_keeps_both_references(tiny, tmp_path):
    data = again(tiny, tmp_path)
    file = data / "all_val.json"
    records = json.loads(file.read_text())
    first = records[0]
    keys = [k for k in first if k.startswith("UnharmPair")]
    pairs = [load_sets(data, "val").retain[0]]
    for k, answer in zip(keys[:2], ("zorb", "wug")):
        question, reply = list(first[k])[:2]
        first[k] = {question: pairs[0].question, reply: answer} | {x: v for x, v in list(first[k].items())[2:]}
    file.write_text(json.dumps(records))
    twice = [i.answer for i in load_sets(data, "val").retain if i.question == pairs[0].question and i.image_id == pairs[0].image_id]
    assert {"zorb", "wug"} <= set(twice)
    rows = read_rows(generate(tiny.model, data, tmp_path / "r.jsonl", splits=["val"], progress=False))
    found = [r["reference"] for r in rows if r["set"] == "retain" and r["question"] == pairs[0].question and r["image_id"] == pairs[0].image_id]
    assert found == twice and len(rows) == len(plan_requests(data, ["val"]))


def begun(tiny, tmp_path, batches=2):
    "A run stopped behind some batches of 8: its part, and the file of an undisturbed run."
    import safeeraser.generate as g
    whole, out = generate(tiny.model, tiny.data, tmp_path / "whole.jsonl", progress=False), tmp_path / "r.jsonl"
    plain, left = g.answer_batch, iter(range(batches))
    def stopped(*a):
        if next(left, None) is None: raise KeyboardInterrupt
        return plain(*a)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(g, "answer_batch", stopped)
        with pytest.raises(KeyboardInterrupt): generate(tiny.model, tiny.data, out, progress=False)
    return tmp_path / "r.jsonl.part", out, whole.read_bytes()


def asked_again(tiny, out) -> int:
    "Batches that the same command asks."
    import safeeraser.generate as g
    plain, seen = g.answer_batch, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(g, "answer_batch", lambda *a: seen.append(1) or plain(*a))
        generate(tiny.model, tiny.data, out, progress=False)
    return len(seen)


DAMAGE = {"nothing": lambda b: b, "half a line": lambda b: b[:-15], "half a sign": lambda b: b + '{"response": "ü'.encode()[:-1], "a number": lambda b: b + b"5\n", "a list": lambda b: b + b"[1]\n",
          "lacking": lambda b: b + b'{"split": "val"}\n', "latin-1": lambda b: b + b'{"a": "\xe9"}\n', "blank": lambda b: b + b"\n\n", "NUL": lambda b: b + b"\0" * 30, "deep": lambda b: b + b"[" * 9999 + b"\n",
          "wrong types": lambda b: b + b'{"schema_version": 1, "method": 5, "seed": [], "image_id": 1, "split": 2, "set": 3, "question": [], "sample": 0, "response": 9, "verdicts": 4}\n'}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_was_answered_stays_whatever_became_of_the_file(name, tiny, tmp_path):
    part, out, whole = begun(tiny, tmp_path)
    held = DAMAGE[name](part.read_bytes())
    part.write_bytes(held)
    header = json.loads(held.split(b"\n")[0])
    kept = resume_rows(part, header)
    assert len(kept) == (15 if name == "half a line" else 16) and part.read_bytes().startswith(held)  # added to, never rewritten
    all_batches = -(-len(plan_requests(tiny.data)) // 8)
    assert asked_again(tiny, out) == all_batches - (1 if name == "half a line" else 2)
    assert out.read_bytes() == whole and not part.exists()


def test_a_part_that_was_stopped_before_its_first_line(tiny, tmp_path):
    part, out, whole = begun(tiny, tmp_path)
    for held in (b"", part.read_bytes()[:40]):
        part.write_bytes(held)
        out.unlink(missing_ok=True)
        generate(tiny.model, tiny.data, out, progress=False)
        assert out.read_bytes() == whole
    part.write_bytes(b"my notes")
    with pytest.raises(SafeEraserError, match="begun with other settings"): generate(tiny.model, tiny.data, out, progress=False)
    assert part.read_bytes() == b"my notes"


def test_a_full_disk_loses_nothing(tiny, tmp_path, monkeypatch):
    import os

    import safeeraser.generate as g
    whole, out, written = generate(tiny.model, tiny.data, tmp_path / "whole.jsonl", progress=False).read_bytes(), tmp_path / "r.jsonl", []
    plain, open_file = g.append, type(out).open
    def no_room(file, mode="r", *args, **more):
        if "r" not in mode: raise OSError(28, os.strerror(28))
        return open_file(file, mode, *args, **more)
    def full(file, new):
        if len(written) == 2:
            plain(file, new[:25])
            monkeypatch.setattr(type(file), "open", no_room)
        written.append(1)
        plain(file, new)
    with monkeypatch.context() as patch:
        patch.setattr(g, "append", full)
        with pytest.raises(SafeEraserError, match=r"r.jsonl.part: cannot be written \(No space left"): generate(tiny.model, tiny.data, out, progress=False)
    monkeypatch.undo()
    assert not out.exists()
    generate(tiny.model, tiny.data, out, progress=False)
    assert out.read_bytes() == whole


def test_finished_is_finished_until_something_changes(tiny, tmp_path):
    shutil.copytree(tiny.model, tmp_path / "model")
    ask = lambda **more: generate(tmp_path / "model", tiny.data, tmp_path / "r.jsonl", progress=False, **more)
    asked = []
    import safeeraser.generate as g
    plain = g.answer_batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(g, "answer_batch", lambda *a: asked.append(1) or plain(*a))
        ask()
        first = len(asked)
        ask()
        assert len(asked) == first
        ask(max_new_tokens=3)
        assert len(asked) > first
        first = len(asked)
        config = tmp_path / "model" / "generation_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"suppress_tokens": [9]}))
        ask(max_new_tokens=3)
        assert len(asked) > first


def test_weights_replaced_between_two_halves_are_refused(tiny, tmp_path):
    from safetensors.torch import load_file, save_file
    part, out, _ = begun(tiny, tmp_path, 1)
    shutil.copytree(tiny.model, tmp_path / "model")
    header = json.loads(part.read_text().split("\n")[0])
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights[next(iter(weights))] += 1
    part.write_text(part.read_text().replace(json.dumps(header["model"]), json.dumps(str(tmp_path / "model"))))
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(SafeEraserError, match="or other weights"): generate(tmp_path / "model", tiny.data, out, progress=False)


def test_links_are_written_through_and_devices_refused(tiny, tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "r.jsonl").symlink_to(tmp_path / "far" / "real.jsonl")
    generate(tiny.model, tiny.data, tmp_path / "r.jsonl", splits=["val"], progress=False)
    assert (tmp_path / "r.jsonl").is_symlink() and read_rows(tmp_path / "far" / "real.jsonl")
    for out in ("/dev/null", tmp_path):
        with pytest.raises(SafeEraserError, match="name a file"): generate(tiny.model, tiny.data, out, progress=False)


WRONG = [(["--temperature", "1e-320"], "temperature=1e-320"), (["--temperature", "inf"], "temperature=inf"), (["--temperature", "1e300"], "temperature=1e+300"), (["--temperature", "1", "--top-p", "0"], "top_p=0.0"),
         (["--top-p", "-1"], "top_p=-1.0"), (["--top-p", "2"], "top_p=2.0"), (["--top-p", "nan"], "top_p=nan"), (["--seed", "-1"], "seed=-1"), (["--seed", "1" + "0" * 40], "seed=1000"),
         (["--splits", "val,val"], "'val' is named twice"), (["--splits", "nope"], "no 'nope' in"), (["--splits", "val,"], "no '' in"), (["--splits", "../x"], "no '../x'"), (["--samples", "3"], "set temperature"),
         (["--max-new-tokens", "1" + "0" * 30], "max_new_tokens=1000"), (["--server", "http://127.0.0.1:9/v1\n"], "a URL such as"), (["--server", "http://h:99999/v1"], "a URL such as"), (["--server", "nonsense"], "a URL such as")]


@pytest.mark.parametrize("more, said", WRONG, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_options_are_looked_at_first(more, said, tiny, tmp_path):
    from typer.testing import CliRunner

    from safeeraser.cli import app
    done = CliRunner().invoke(app, ["generate", "--model", str(tiny.model), "--data", str(tiny.data), "--out", str(tmp_path / "r.jsonl"), *more])
    assert isinstance(done.exception, SafeEraserError) and said in str(done.exception) and "\n" not in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_a_begun_thought_is_known_as_one():
    "The chat template opens the thought itself; the response holds only its end, or none."
    from types import SimpleNamespace

    from safeeraser.generate import begun_thought
    for opened, said, answer in (("<think>\n", "A cup.</think> Red.", "Red."), ("<think>\n", "A cup, and", None), ("", "Red.", "Red.")):
        encoder = SimpleNamespace(prompt=lambda q, opened=opened: f"user: {q} assistant: {opened}")
        assert answer_of({"response": begun_thought(encoder, "what is it ?") + said}) == answer


def test_the_command_says_what_is_wrong_in_one_line(tiny, tmp_path):
    done = run("generate", "--model", tiny.model, "--data", tiny.data, "--out", tmp_path / "r.jsonl", "--temperature", "1", "--top-p", "0")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "top_p=0.0: a number above 0, at most 1 belongs here" in done.stderr


# In memory: tokens, how sure the model was of them, and words that are put into its mouth.


def scored(model, encoder, item, n, begun=(), **more):
    "transformers' own `generate` behind a prompt and some tokens: the tokens that follow, and the probability of each."
    inputs = behind(encoder, item, begun)
    out = model.generate(**inputs, max_new_tokens=n - len(begun), do_sample=False, return_dict_in_generate=True, output_scores=True, **more)
    tokens = out.sequences[0, inputs["input_ids"].shape[1]:].tolist()
    return tokens, [s[0].softmax(-1)[t].item() for s, t in zip(out.scores, tokens)]


def behind(encoder, item, tokens):
    inputs = encoder.prompts([item])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tokens], dtype=torch.long)], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


@torch.no_grad()
def probabilities(model, encoder, item, tokens):
    "Of each token, one plain forward pass after the other."
    return [model(**behind(encoder, item, tokens[:k])).logits[0, -1].softmax(-1)[t].item() for k, t in enumerate(tokens)]


def ids_of(encoder, row): return [encoder.processor.tokenizer.convert_tokens_to_ids(t) for t in row["tokens"]]


@pytest.mark.parametrize("share", [True, False])
def test_confidences_are_those_of_transformers_scores(share, talker, tiny):
    model, encoder = talker
    items = questions(tiny)
    rows = answer(model, encoder, items, max_new_tokens=8, share_images=share)
    assert [r["question"] for r in rows] == [i.question for i in items]
    for item, row in zip(items, rows):
        tokens, likely = scored(model, encoder, item, 8)
        kept = [t for t in tokens if t not in encoder.end_ids]
        assert ids_of(encoder, row) == kept and row["response"] == encoder.processor.tokenizer.decode(kept)
        assert row["confidences"] == pytest.approx(likely[:len(kept)], rel=1e-3, abs=1e-5)
    assert len({r["response"] for r in rows}) > 5


@pytest.mark.parametrize("share", [True, False])
def test_an_answer_begins_with_the_words_that_are_set(share, talker, tiny):
    model, encoder = talker
    items, words = questions(tiny), "wrap it in"
    begun = encoder.processor.tokenizer(words, add_special_tokens=False).input_ids
    rows = answer(model, encoder, items, words, max_new_tokens=9, share_images=share)
    for item, row in zip(items, rows):
        assert row["response"].startswith(words) and row["first_words"] == words
        tokens, likely = scored(model, encoder, item, 9, begun)
        kept = begun + [t for t in tokens if t not in encoder.end_ids]
        assert ids_of(encoder, row) == kept
        expected = (probabilities(model, encoder, item, begun) + likely)[:len(kept)]
        assert row["confidences"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert [r["response"] for r in rows] != [r["response"] for r in answer(model, encoder, items, max_new_tokens=9)]


@pytest.mark.parametrize("share", [True, False])
def test_confidences_are_the_model_s_whatever_chose_the_token(share, talker, tiny):
    "Neither a setting of the model's own, nor a temperature, nor a nucleus changes how sure the model was."
    model, encoder = talker
    items = questions(tiny)[:3]
    model.generation_config.update(repetition_penalty=1.7, suppress_tokens=[5, 9])
    rows = answer(model, encoder, items, "wrap", samples=2, temperature=3.0, top_p=.8, max_new_tokens=6, share_images=share)
    assert [r["sample"] for r in rows] == [0, 1] * 3 and rows[0]["decoding"]["model_settings"]["repetition_penalty"] == 1.7
    assert len({r["response"] for r in rows}) == 6
    for row, item in zip(rows, [i for i in items for _ in range(2)]):
        assert row["confidences"] == pytest.approx(probabilities(model, encoder, item, ids_of(encoder, row)), rel=1e-3, abs=1e-5)


def test_beams_have_confidences_and_first_words_too(talker, tiny):
    model, encoder = talker
    item = questions(tiny)[0]
    model.generation_config.update(num_beams=3)
    plain, forced = (answer(model, encoder, [item], words, max_new_tokens=7)[0] for words in ("", "wrap it"))
    assert plain["response"] == encoder.processor.tokenizer.decode(by_transformers(model, encoder, item, 7), skip_special_tokens=True).strip()
    assert forced["response"].startswith("wrap it") and "beam search" in forced["decoding"]["one_by_one"]
    for row in (plain, forced):
        assert row["confidences"] == pytest.approx(probabilities(model, encoder, item, ids_of(encoder, row)), rel=1e-3, abs=1e-5)


def test_a_file_and_memory_hold_the_same_answers(tiny, tmp_path):
    model, processor = load_model(tiny.model, "cpu")
    items = [*load_sets(tiny.data, "val").forget]
    written = read_rows(generate(tiny.model, tiny.data, tmp_path / "r.jsonl", splits=["val"], samples=2, temperature=1.0, seed=3, progress=False))
    rows = answer(model, Encoder(processor), items, samples=2, temperature=1.0, max_new_tokens=6, seed=3, method="base")
    same = [r for r in written if r["set"] == "forget"]
    drop = lambda r, *names: {k: v for k, v in r.items() if k not in names}
    assert [drop(r, "tokens", "confidences") | {"seed": 0} for r in rows] == [drop(r, "run") for r in same]


def test_judges_read_what_is_in_memory(talker, tiny, tmp_path):
    from safeeraser.judge import judge_rows
    from safeeraser.rows import write_rows
    model, encoder = talker
    rows = answer(model, encoder, questions(tiny)[:3], "sorry i can not help with that", max_new_tokens=12)
    judged = judge_rows(rows, "rule")
    assert [r["verdicts"]["rule"]["refusal"]["value"] for r in judged] == [True] * 3
    write_rows(tmp_path / "r.jsonl", judged)
    assert read_rows(tmp_path / "r.jsonl") == judged


def test_a_model_is_left_as_it_was(talker, tiny):
    from safeeraser.packed import attention_of
    model, encoder = talker
    model.set_attn_implementation("eager")
    model.train()
    answer(model, encoder, questions(tiny)[:2], max_new_tokens=3, share_images=True)
    assert model.training and attention_of(model) == "eager"
    model.eval()
    model.set_attn_implementation("sdpa")
    assert answer(model, encoder, []) == []


@pytest.mark.parametrize("more, said", [(dict(first_words="wrap it", max_new_tokens=2), "first_words: 2 tokens; max_new_tokens=2 leaves none"),
                                        (dict(first_words="so </s>"), "signal to the model"), (dict(samples=2), "set temperature > 0"),
                                        (dict(temperature=-1.0), "temperature=-1.0"), (dict(batch_size=0), "batch_size=0")])
def test_what_cannot_be_asked_is_one_sentence(more, said, talker, tiny):
    with pytest.raises(SafeEraserError, match=re.escape(said)): answer(*talker, questions(tiny)[:1], **more)
