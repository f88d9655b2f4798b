"""The engine's scores and samples are the model's own, whoever shares a batch."""
import copy
from collections import Counter

import pytest
import torch

from safeeraser.core import SafeEraserError
from safeeraser.data import load_sets
from safeeraser.engine import AnswerCache, batches_within, check_engine, Engine, PrefixCache
from safeeraser.generate import RowSampler, answer_batch, generate
from safeeraser.packed import attention_of
from safeeraser.packing import Packer

from waits import Waits


def questions(tiny): return [*load_sets(tiny.data, "val")]


@torch.inference_mode()
def scores_of(engine, items, steps):
    "Scores of some tokens for each item, in the items' order: [steps, n, V]."
    rows = Packer(engine.encoder).pack_prompts(items)
    state, ids, positions = engine.begin(rows)
    order, found = torch.tensor([i for r in rows for i in r.items]), []
    for _ in range(steps):
        scores = engine.step(state, ids, positions)
        found.append(torch.empty_like(scores).index_copy_(0, order, scores))
        ids, positions = scores.argmax(-1, keepdim=True), positions[:, -1:] + 1
    return torch.stack(found)


@pytest.mark.parametrize("room", [64, 4])  # 4: the memory of a batch's own tokens has to grow on the way
def test_scores_are_those_of_plain_forward_passes(room, sharp, tiny, monkeypatch):
    monkeypatch.setattr("safeeraser.engine.ROOM", room)
    model, encoder = sharp
    items, steps = questions(tiny)[::3], 5
    found = scores_of(Engine(*sharp), items, steps)
    with torch.no_grad():
        for n, item in enumerate(items):
            inputs = encoder.prompts([item])
            for t in range(steps):
                expected = model(**inputs).logits[0, -1]
                torch.testing.assert_close(found[t, n], expected, atol=2e-4, rtol=1e-4)
                inputs["input_ids"] = torch.cat([inputs["input_ids"], expected.argmax()[None, None]], 1)
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])


def test_greedy_answers_are_generate_s(sharp, tiny):
    items = questions(tiny)
    expected = answer_batch(*sharp, items, 10)
    assert len(set(expected)) > 5 and len({len(a) for a in expected}) > 1
    assert Engine(*sharp).answer(items, 10) == expected
    assert Engine(*sharp, tokens_at_once=1).answer(items, 10) == expected      # an image at a time
    assert [Engine(*sharp).answer([i], 10)[0] for i in items] == expected      # a question at a time
    rows = Packer(sharp[1]).pack_prompts(items)
    batches = lambda n: [len(b) for b in batches_within(sharp[0], rows, 10, n)]
    assert batches(1) == [1] * len(rows) and batches(2**20) == [len(rows)] and 1 < len(batches(400)) < len(rows)


def test_samples_do_not_depend_on_the_batch(sharp, tiny):
    items = questions(tiny) * 3
    seeds = list(range(len(items)))
    expected = answer_batch(*sharp, items, 10, RowSampler(seeds, 1.0, .9))
    for size in (len(items), 5):
        found = [a for k in range(0, len(items), size) for a in Engine(*sharp).answer(items[k:k + size], 10, RowSampler(seeds[k:k + size], 1.0, .9))]
        assert found == expected
    assert len(set(expected)) > len(set(items))


def test_rows_that_ended_leave(sharp, tiny, monkeypatch):
    model, encoder = sharp
    items = questions(tiny)
    sizes, plain = [], Engine.step
    monkeypatch.setattr(Engine, "step", lambda self, state, ids, positions: sizes.append(len(ids)) or plain(self, state, ids, positions))
    engine = Engine(model, encoder)
    free = engine.answer(items, 12)
    words = [encoder.processor.tokenizer(a, add_special_tokens=False).input_ids for a in free]
    common = max({t for w in words for t in w}, key=lambda t: sum(t in w for w in words))
    engine.ends, sizes[:] = engine.ends | {common}, []
    cut = engine.answer(items, 12)
    assert sizes[0] == len(items) and sizes[-1] < len(items) / 2
    ids = lambda text: encoder.processor.tokenizer(text, add_special_tokens=False).input_ids
    for before, after in zip(words, map(ids, cut)): assert after == before[:before.index(common) + 1] if common in before else after == before


def test_samples_stay_a_row_s_own_when_others_leave(sharp, tiny):
    "Every third word ends an answer."
    items, engine = questions(tiny) * 2, Engine(*sharp)
    engine.ends = set(range(0, len(sharp[1].processor.tokenizer), 3))
    alone = [engine.answer([item], 10, RowSampler([k], 1.0, .9))[0] for k, item in enumerate(items)]
    assert len({len(a.split()) for a in alone}) > 2
    assert engine.answer(items, 10, RowSampler(list(range(len(items))), 1.0, .9)) == alone


def test_images_are_kept_apart(sharp, tiny):
    sets = load_sets(tiny.data, "val")
    pairs = [i for f, d in zip(sets.forget, sets.decouple) for i in (f, d)]  # the same words about two images, alternating
    assert Engine(*sharp).answer(pairs, 8) == [Engine(*sharp).answer([i], 8)[0] for i in pairs]


def test_grouped_query_heads_and_padding():
    "Against attention written out, for two images and rows of different beginnings."
    g, scale = torch.Generator().manual_seed(0), .4
    prefixes, n, heads, kv_heads, d, t = [], 3, 4, 2, 8, 5
    for size in (6, 9):
        prefixes.append(PrefixCache())
        prefixes[-1].layers[0] = tuple(torch.randn(1, kv_heads, size, d, generator=g) for _ in range(2))
    first, owner = torch.tensor([0, 2, 1]), [0, 0, 1]
    state = AnswerCache(prefixes, owner, first)
    q, k, v = (torch.randn(n, h, t + 1, d, generator=g) for h in (heads, kv_heads, kv_heads))
    found = state.attend(0, q[:, :, :t], k[:, :, :t], v[:, :, :t], scale)
    state.column += t
    last = state.attend(0, q[:, :, t:], k[:, :, t:], v[:, :, t:], scale)
    for row in range(n):
        keys, values = (torch.cat([p[0], x[row, :, first[row]:]], 1).repeat_interleave(heads // kv_heads, 0) for p, x in zip(prefixes[owner[row]].layers[0], (k, v)))
        for column in range(first[row], t + 1):
            seen = keys.shape[1] - t + column
            weights = (q[row, :, column:column + 1] @ keys[:, :seen].transpose(1, 2) * scale).softmax(-1)
            torch.testing.assert_close((found if column < t else last)[row, :, column if column < t else 0], (weights @ values[:, :seen])[:, 0], atol=1e-5, rtol=1e-4)


def test_a_model_that_fails_the_check_answers_the_ordinary_way(sharp, tiny):
    model, encoder = sharp
    model.set_attn_implementation("sdpa")
    before = attention_of(model)
    class Shifted(type(model)):
        def forward(self, *args, position_ids=None, **kwargs): return super().forward(*args, **kwargs)
    kind, model.__class__ = type(model), Shifted
    engine, verdict = check_engine(model, encoder, questions(tiny)[:3])
    model.__class__ = kind
    assert engine is None and "off the model's own" in verdict.why and attention_of(model) == before


def test_shared_and_ordinary_files_are_the_same(tiny, tmp_path):
    a, b = (generate(tiny.model, tiny.data, tmp_path / f"{s}.jsonl", samples=2, temperature=1.0, share_images=s, progress=False) for s in (True, False))
    assert a.read_bytes() == b.read_bytes()


def test_a_replaced_image_stops_a_resumed_run(tiny, tmp_path):
    import shutil

    from PIL import Image
    shutil.copytree(tiny.data.parent, tmp_path / "w")
    data = tmp_path / "w" / "dataset"
    out, part = tmp_path / "r.jsonl", tmp_path / "r.jsonl.part"
    import safeeraser.generate as g
    requests, answer, batches = g.plan_requests(data), g.answer_batch, []
    def killed(*args, **kwargs):
        if batches: raise KeyboardInterrupt
        batches.append(1)
        return answer(*args, **kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(g, "answer_batch", killed)
        with pytest.raises(KeyboardInterrupt): generate(tiny.model, data, out, progress=False)
    assert len(part.read_text().splitlines()) == 1 + 8 and not out.exists()  # a header, and the first batch
    image = requests[0].item.image
    Image.new("RGB", Image.open(image).size, "black").save(image)
    with pytest.raises(SafeEraserError, match="other settings, questions or images"): generate(tiny.model, data, out, progress=False)


@pytest.mark.parametrize("case, most", [("greedy", 1), ("sampled", 1), ("a model's own rules", 2)])
def test_python_waits_for_the_gpu_once_a_token(case, most, sharp, tiny):
    "And with rules of the model's own, which read what was written, once more."
    (model, encoder), items, engine = sharp, questions(tiny)[:6], Engine(*sharp)
    engine.ends = set()
    own, model.generation_config = model.generation_config, copy.deepcopy(model.generation_config)
    if case.startswith("a model"): model.generation_config.update(suppress_tokens=[3])
    def waits(tokens: int) -> Counter:
        with Waits(model) as found: said = engine.answer(items, tokens, RowSampler(range(6), 1.0, .9) if case == "sampled" else None)
        assert len(said) == len(items)
        return found.found
    few, many = waits(4), waits(10)
    model.generation_config = own
    assert few["cpu"] == 4 and many["cpu"] == 10
    assert 6 <= (many - few).total() <= 6 * most, many - few


def test_the_counter_counts():
    model = torch.nn.Linear(2, 2)
    with Waits(model) as found:
        x = model(torch.zeros(3, 2).to(model.weight.device))  # a copy there
        y = x.cpu()                                       # and one back
        x[x > 0], bool(x.isfinite().all()), x[torch.tensor([0])], torch.tensor([1.], device=x.device)
        y.tolist(), y[y > 0], torch.zeros(2).to(y.device), x[:1] + x.argmax(), x[x.argmax(0)]
    assert found.found == {"to": 1, "cpu": 1, "__getitem__": 2, "__bool__": 1, "tensor": 1}
