"""One packed step is the step of separate rows: losses, gradients, whatever the route and however rows are cut."""
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safeeraser.core import SafeEraserError
from safeeraser.data import load_refusals, load_sets
from safeeraser.encoder import Collator, Encoder
from safeeraser.slots import epoch_plan, KINDS, SlotDataset
from safeeraser.loss import METHODS, parse_objective
from safeeraser.model import add_adapter, load_model
from safeeraser.packed import check_packing, PackedCollator, use_route
from safeeraser.packing import only, own_positions, Packer, packing_mask, passes, segment_numbers, stack_rows
from safeeraser.predict import batch_tokens
from safeeraser.trainer import check_rows, mostly_image, silent, unlearn

SPELLED = [*METHODS, "npo(beta=0.5)+kl+pd", "simnpo+ce", "dpo+0.5 ce+pd", "wga+ce", "satimp(beta1=1)+kl", "undial+ce+pd"]


@pytest.fixture
def jittered(tiny):
    "The tiny model with an adapter away from theta_0, where KL is flat and LoRA's B is zero."
    model, processor = load_model(tiny.model, "cpu")
    adapted, g = add_adapter(model, 4, 8, 0.0), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad: p.add_(.05 * torch.randn(p.shape, generator=g))
    return adapted, Encoder(processor)


def slots_of(tiny, kinds, n=8):
    sets, refusals = load_sets(tiny.data), load_refusals(tiny.data)
    images = lambda items: [i.image_id for i in items]
    plan = epoch_plan(images(sets.forget), images(sets.retain), len(refusals), seed=3, epoch=0, together=True)
    return [SlotDataset(sets, refusals, kinds)[s] for s in plan[:n]]


def step(model, batch, objective, route=None):
    "Loss and gradients of a whole step, pass by pass."
    model.zero_grad(set_to_none=True)
    counts, total = dict(zip(KINDS, batch["n_items"].tolist())), 0.0
    for part in batch.get("passes", [batch]):
        loss, _ = objective(batch_tokens(model, part, objective, route), counts)
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(a, b):
    assert a[0] == pytest.approx(b[0], rel=1e-5, abs=1e-5)
    assert a[1].keys() == b[1].keys() and max(g.norm() for g in a[1].values()) > 1e-4
    for name in a[1]: assert (a[1][name] - b[1][name]).norm() <= 1e-4 * a[1][name].norm() + 1e-8, name


@pytest.mark.parametrize("route", ["dense", "split"])
@pytest.mark.parametrize("method", SPELLED)
def test_a_packed_step_is_the_separate_rows_step(method, route, jittered, tiny):
    (model, encoder), objective = jittered, parse_objective(method)
    slots = slots_of(tiny, objective.kinds)
    expected = step(model, Collator(encoder)(slots), objective)
    use_route(model, route)
    assert_same(expected, step(model, PackedCollator(Packer(encoder), objective.reference_kinds)(slots), objective, route))


@pytest.mark.parametrize("row_tokens", [45, 80])
def test_cutting_rows_changes_nothing(row_tokens, jittered, tiny):
    (model, encoder), objective = jittered, parse_objective("dpo+ce+pd")  # refusal and harmful answer of an item must stay together
    slots = slots_of(tiny, objective.kinds)
    whole, cut = (PackedCollator(Packer(encoder, n), objective.reference_kinds)(slots) for n in (3072, row_tokens))
    assert len(cut["composition"]) > len(whole["composition"])
    use_route(model, "split")
    assert_same(step(model, whole, objective, "split"), step(model, cut, objective, "split"))


def test_gradient_checkpointing_changes_nothing(jittered, tiny):
    (model, encoder), objective = jittered, parse_objective("kl+pd")
    batch = PackedCollator(Packer(encoder), objective.reference_kinds)(slots_of(tiny, objective.kinds))
    for route in ("dense", "split"):
        use_route(model, route)
        model.train()
        plain = step(model, batch, objective, route)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert_same(plain, step(model, batch, objective, route))
        model.gradient_checkpointing_disable()


@pytest.mark.parametrize("route", ["dense", "split"])
def test_bfloat16_packs_as_far_as_it_can_tell(route, tiny):
    model, processor = load_model(tiny.model, "cpu", torch.bfloat16)
    adapted, encoder = add_adapter(model, 4, 8, 0.0), Encoder(processor)
    rows = [r for s in slots_of(tiny, ("forget", "retain")) for r in s]
    found = check_packing(adapted, encoder, rows, (route,))
    assert model.dtype == torch.bfloat16 and found.route == route and found.difference < .06
    batch = PackedCollator(Packer(encoder))(slots_of(tiny, ("forget", "retain")))
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.train()
    with torch.autocast("cpu", torch.bfloat16): loss, gradient = step(adapted, batch, parse_objective("gd"), route)
    assert torch.tensor(loss).isfinite() and all(g.isfinite().all() for g in gradient.values())


def test_segments_see_what_a_row_of_its_own_would_see():
    "Against a mask written token by token."
    lengths, window = [5, 3, 1, 4], 4
    segment, position = segment_numbers(lengths), own_positions(lengths)
    block = torch.tensor([-1, 0, 0, 0, -1] + [-1] * 8)
    found = packing_mask(segment[None], position[None], block[None], window)[0, 0]
    for q in range(13):
        for k in range(13):
            own_row = segment[k] == 0 or segment[k] == segment[q]
            sees = own_row and position[k] <= position[q] and (segment[k] != 0 or k <= q) or (block[q] >= 0 and block[q] == block[k])
            assert bool(found[q, k]) == (bool(sees) and bool(position[q] - position[k] < window) or q == k), (q, k)


def test_padding_and_company_change_nothing(jittered, tiny):
    model, encoder = jittered
    objective = parse_objective("gd+pd")
    slots = slots_of(tiny, objective.kinds)
    rows = [r for s in slots for r in s]
    packed = Packer(encoder).pack(rows, list(range(len(rows))))
    assert len({len(p) for p in packed}) > 1 and len(packed) > 2
    use_route(model, "dense")
    together, alone = ({"passes": [stack_rows(b) for b in passes(packed, n)], "n_items": torch.tensor([8, 0, 8, 8])} for n in (10**6, 1))
    assert len(together["passes"]) == 1 and len(alone["passes"]) == len(packed)
    assert_same(step(model, together, objective, "dense"), step(model, alone, objective, "dense"))


def test_reference_rows_are_the_asked_segments(jittered, tiny):
    _, encoder = jittered
    rows = [r for s in slots_of(tiny, ("forget", "retain")) for r in s]
    packed = Packer(encoder).pack(rows, list(range(len(rows))))[0]
    kept = only(packed, ("retain",))
    alone = Packer(encoder).pack([r for r in rows if r.kind == "retain" and r.item.image_id == packed.image_id])[0]
    ids = [t for n, part in enumerate(torch.tensor(kept.ids).split(kept.lengths)) for t in part.tolist()]
    assert kept.kinds == ["retain"] * len(kept.kinds) and sum(kept.lengths) == len(ids)
    assert ids[:kept.lengths[0]] == packed.ids[:packed.lengths[0]] and ids[-1] == alone.ids[-1]
    assert only(packed, ("decouple",)) is None


def test_a_silent_pass_carries_no_loss(jittered, tiny):
    (model, encoder), objective = jittered, parse_objective("kl+pd")
    batch = PackedCollator(Packer(encoder), objective.reference_kinds, even=True)(slots_of(tiny, objective.kinds))
    use_route(model, "dense")
    part = silent(batch["passes"][0])
    model.zero_grad(set_to_none=True)
    loss, _ = objective(batch_tokens(model, part, objective, "dense"), dict(zip(KINDS, batch["n_items"].tolist())))
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert all(p["reference"] is not None for p in batch["passes"])


def test_the_composition_of_steps_is_recorded(tiny, tmp_path):
    record = unlearn(tiny.model, tiny.data, tmp_path / "run", "gd+pd", seed=1, progress=False, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                     num_train_epochs=2, lora_r=4, use_cpu=True, save_strategy="no", packing="dense")
    assert record["packing"]["route"] == "dense" and record["effective_batch"] == 4
    steps = [json.loads(line) for line in (tmp_path / "run" / "checkpoints" / "composition.jsonl").read_text().splitlines()]
    sets = load_sets(tiny.data)
    assert [s["step"] for s in steps] == list(range(1, record["steps"] + 1))
    for half in (steps[:len(steps) // 2], steps[len(steps) // 2:]):
        shown = lambda kind: sum(row.get(kind, 0) for s in half for row in s["rows"])
        assert (shown("forget"), shown("decouple"), shown("retain")) == (len(sets.forget), len(sets.decouple), 2 * len(sets.retain))


def test_images_are_grouped_where_they_are_most_of_a_row(tiny, tmp_path):
    _, processor = load_model(tiny.model, "cpu")
    encoder, rows = Encoder(processor), check_rows(SlotDataset(load_sets(tiny.data), ["no"]))
    row = Packer(encoder).pack(rows)[0]
    own = sum(row.lengths[1:]) / len(row.items)
    assert not mostly_image(encoder, rows) and row.lengths[0] < 2 * own  # the tiny image has 16 tokens
    longer = "so " * 200
    assert not mostly_image(encoder, [replace(r, answer=longer) for r in rows])
    settings = dict(seed=1, progress=False, max_steps=1, lora_r=4, use_cpu=True, save_strategy="no", per_device_train_batch_size=4, gradient_accumulation_steps=1)
    plain = unlearn(tiny.model, tiny.data, tmp_path / "default", "ga", **settings)["packing"]
    assert plain["route"] is None and "less than two thirds of a row" in plain["why"] and not plain["images_grouped"]
    for asked, grouped in ((True, True), (False, False)):
        out = tmp_path / str(asked)
        record = unlearn(tiny.model, tiny.data, out, "ga", group_images=asked, **settings)
        rows = json.loads((out / "checkpoints" / "composition.jsonl").read_text().splitlines()[0])["rows"]
        assert record["packing"]["images_grouped"] is grouped
        assert len(rows) == (1 if grouped else 3)  # of the three images, four questions each
    assert unlearn(tiny.model, tiny.data, tmp_path / "off", "ga", packing="off", group_images=True, **settings)["packing"]["images_grouped"] is False


def test_an_image_of_many_tokens_is_most_of_a_row(tmp_path):
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    from shape import build_processor, make_records, SHAPES
    for mean, most in ((30, True), (100, True), (600, False)):
        rows = make_records(tmp_path, SHAPES["cpu"], mean)[0].forget
        assert mostly_image(Encoder(build_processor(SHAPES["cpu"])), rows) is most


def test_off_and_named_routes(tiny, tmp_path):
    settings = dict(seed=1, progress=False, max_steps=1, lora_r=4, use_cpu=True, save_strategy="no")
    assert unlearn(tiny.model, tiny.data, tmp_path / "off", "ga", packing="off", **settings)["packing"]["route"] is None
    assert unlearn(tiny.model, tiny.data, tmp_path / "split", "ga", packing="split", **settings)["packing"]["route"] == "split"
    with pytest.raises(SafeEraserError, match="packing='slit': one of auto, off"):
        unlearn(tiny.model, tiny.data, tmp_path / "x", "ga", packing="slit", **settings)
    assert not (tmp_path / "x").exists()


def test_a_single_row_longer_than_the_context_is_refused(jittered, tiny):
    _, encoder = jittered
    rows = [r for s in slots_of(tiny, ("forget",)) for r in s]
    with pytest.raises(SafeEraserError, match="more than max_length=20"): Packer(Encoder(encoder.processor, max_length=20)).pack(rows)
    assert Packer(Encoder(encoder.processor, max_length=60), row_tokens=60).pack(rows)  # together they are longer: split


def test_the_check_sees_gradients_too(jittered, tiny, monkeypatch):
    import safeeraser.attention as attention
    model, encoder = jittered
    rows = [r for s in slots_of(tiny, ("forget", "decouple")) for r in s][:6]
    assert check_packing(model, encoder, rows, ("split",)).route == "split"
    right = attention.flash_backward
    monkeypatch.setattr(attention, "flash_backward", lambda *a: tuple(1.01 * g for g in right(*a)))
    verdict = check_packing(model, encoder, rows, ("split",))
    assert verdict.route is None and "gradients" in verdict.why
