"""Every family of vision-language models: its parts are found, its adapter holds what it should, and packed rows equal separate ones."""
import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, llava_next, make_sets, SAY, template
from peft import PeftModel
from PIL import Image

from safeeraser import trainer
from safeeraser.cache import VisionCache
from safeeraser.core import Place, SafeEraserError
from safeeraser.data import Item, parse_record, Sets
from safeeraser.encoder import Collator, Encoder
from safeeraser.slots import KINDS, Row, Slot, SlotDataset
from safeeraser.loss import parse_objective
from safeeraser.model import add_adapter, anatomy, load_adapter, vanilla
from safeeraser.attention import Rows, split_attention
from safeeraser.packed import check_packing, packed_log_probs, PackedCollator, use_route
from safeeraser.packing import CannotPack, Packer, passes, stack_rows

ROUTES = [(name, route) for name, family in FAMILIES.items() for route in family.routes]
METHODS = ("gd+pd", "kl+pd", "po+pd", "npo+pd", "dpo+ce+pd")
@pytest.fixture(scope="module")
def sets(tmp_path_factory): return make_sets(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def built():
    "Models are built once and left as they are."
    made = {}
    def get(name):
        if name not in made: made[name] = FAMILIES[name].make_model()
        return made[name]
    return get


def rows(sets, kinds=KINDS):
    data = SlotDataset(sets, ["i cannot help with that", "sorry no"], kinds)
    return [data[Slot(k, retain=(k,) if k < 2 else (2,) if k == 3 else (), refusal=k % 2)] for k in range(len(data))]


def adapted(built, name):
    "The family's model with an adapter that does something."
    model = add_adapter(copy.deepcopy(built(name)), r=2, alpha=4, dropout=0.)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(.05 * torch.randn_like(p))
    return model


def gradient(loss, model): return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])])


@pytest.mark.parametrize("name", FAMILIES)
def test_parts(name, built):
    family, found = FAMILIES[name], anatomy(built(name))
    assert (found.vision, found.language) == ("model." + family.vision, "model." + family.language)
    assert found.projector == tuple("model." + p for p in family.projector)


@pytest.mark.parametrize("name", FAMILIES)
def test_adapter_sits_on_language_model_and_projector_alone(name, built):
    model, family = add_adapter(copy.deepcopy(built(name)), r=2, alpha=4), FAMILIES[name]
    trainable = {n.removeprefix("base_model.model.model.") for n, p in model.named_parameters() if p.requires_grad}
    lora, saved = {n for n in trainable if "lora_" in n}, {n for n in trainable if "modules_to_save" in n}
    assert trainable == lora | saved and all(n.startswith(family.language + ".layers.") for n in lora)
    linear = [n for n, m in built(name).model.get_submodule(family.language + ".layers").named_modules() if isinstance(m, torch.nn.Linear)]
    assert len(lora) == 2 * len(linear)
    expected = {f"{p}.modules_to_save.default.{n}" for p in family.projector for n, _ in built(name).model.get_submodule(p).named_parameters()}
    assert saved == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_vanilla_is_the_pristine_model_and_the_adapter_comes_back(name, built, sets, tmp_path):
    inputs = Encoder(FAMILIES[name].make_processor()).rows(rows(sets)[0][:2])
    del inputs["labels"]
    def logits(model):
        with torch.no_grad(): return model.eval()(**inputs).logits
    model, pristine = adapted(built, name), logits(built(name))
    model.save_pretrained(tmp_path)
    with vanilla(model): assert torch.equal(logits(model), pristine)
    assert not torch.allclose(logits(model), pristine, atol=1e-2)
    assert torch.equal(logits(load_adapter(copy.deepcopy(built(name)), tmp_path)), logits(model))
    plain = PeftModel.from_pretrained(copy.deepcopy(built(name)), str(tmp_path))
    assert torch.equal(logits(plain), logits(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_kept_features_change_nothing(name, built, sets):
    model, inputs = adapted(built, name).eval(), Encoder(FAMILIES[name].make_processor()).rows(sum(rows(sets), [])[:6])
    del inputs["labels"]
    with torch.no_grad():
        expected = model(**inputs).logits
        with VisionCache(model): found = [model(**inputs).logits for _ in range(2)]
    for logits in found: assert torch.allclose(logits, expected, atol=1e-5)


def separate(model, encoder, rows):
    "Log-probabilities of each row's answer, from a pass of its own."
    found = []
    for row in rows:
        inputs = encoder.rows([row])
        labels = inputs.pop("labels")[:, 1:]
        logp = model(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1)
        found.append(logp[labels != -100].gather(1, labels[labels != -100][:, None])[:, 0])
    return found


def packed(model, encoder, groups, route):
    "The same from packed rows, a pass for each group of images; in the order of the rows."
    found = {}
    for group in groups:
        batch = stack_rows(group)
        at = batch["labels"] != -100
        logp = packed_log_probs(model, batch, route).gather(1, batch["labels"][at][:, None])[:, 0]
        item = torch.cat([torch.tensor([-1, *r.items]).repeat_interleave(torch.tensor(r.lengths)) for r in group])
        row_at = torch.cat([a[:sum(r.lengths)] for a, r in zip(at, group)])
        for i in [i for r in group for i in r.items]: found[i] = logp[item[row_at] == i]
    return [found[i] for i in sorted(found)]


@pytest.mark.parametrize("together", [True, False], ids=["images in one pass", "an image a pass"])
@pytest.mark.parametrize("name, route", ROUTES)
def test_packed_rows_are_separate_rows(name, route, together, built, sets, record_property):
    encoder, model, flat = Encoder(FAMILIES[name].make_processor()), adapted(built, name), sum(rows(sets), [])
    expected = separate(model, encoder, flat)
    made = Packer(encoder).pack(flat, list(range(len(flat))))
    assert len(made) == 4 and len(list(passes(made))) < 4
    use_route(model, route)
    found = packed(model, encoder, passes(made) if together else [[m] for m in made], route)
    assert [len(x) for x in found] == [len(x) for x in expected]
    off = (torch.cat(found) - torch.cat(expected)).abs().max().item()
    slope, slope_expected = (gradient(torch.cat(x).mean(), model) for x in (found, expected))
    relative = ((slope - slope_expected).norm() / slope_expected.norm()).item()
    record_property("log-probability", off), record_property("gradient", relative)
    assert off < 1e-5 and relative < 1e-4


@pytest.mark.parametrize("name, route", ROUTES)
def test_packed_losses_are_separate_losses(name, route, built, sets):
    encoder, model = Encoder(FAMILIES[name].make_processor()), adapted(built, name)
    for method in METHODS:
        objective = parse_objective(method)
        slots = rows(sets, objective.kinds)
        plain, step = Collator(encoder)(slots), PackedCollator(Packer(encoder), objective.reference_kinds)(slots)
        counts = dict(zip(KINDS, plain["n_items"].tolist()))
        assert torch.equal(step["n_items"], plain["n_items"])
        use_route(model, "dense")
        loss = objective(trainer.batch_tokens(model, plain, objective), counts)[0]
        use_route(model, route)
        shared = sum(objective(trainer.batch_tokens(model, b, objective, route), counts)[0] for b in step["passes"])
        slope, slope_shared = gradient(loss, model), gradient(shared, model)
        assert abs(loss - shared).item() < 1e-5 * max(1, abs(loss).item()), method
        assert (slope - slope_shared).norm() < 1e-4 * slope.norm(), method


@pytest.mark.parametrize("name", FAMILIES)
def test_verdict(name, built, sets):
    family, model, encoder = FAMILIES[name], adapted(built, name), Encoder(FAMILIES[name].make_processor())
    check = sum(rows(sets), [])[:8]
    for route in ("dense", "split"):
        verdict = check_packing(model, encoder, check, (route,))
        assert (verdict.route == route) == (route in family.routes), verdict
        assert verdict.route or verdict.why and "\n" not in verdict.why


def test_an_answer_is_not_seen_before_it_is_given(built, sets):
    "PaliGemma's prompt is read in both directions; an answer's tokens must only see what is before them."
    processor, model = FAMILIES["paligemma"].make_processor(), built("paligemma")
    encoder, tok = Encoder(processor), processor.tokenizer
    row = rows(sets)[0][0]
    batch = encoder.rows([row, replace(row, live=False)])
    assert (batch["labels"][1] == -100).all()
    labelled = batch["labels"][0] != -100
    assert tok.decode(batch["labels"][0][labelled]) == f"{row.answer} {tok.eos_token}"
    own = {k: v[:1] for k, v in batch.items() if k != "labels"}
    last = labelled.nonzero()[-1].item()
    other = own | {"input_ids": own["input_ids"].clone()}
    other["input_ids"][0, last] = tok.convert_tokens_to_ids("box")
    with torch.no_grad(): first, second = (model(**x).logits[0, :last] for x in (own, other))
    assert torch.allclose(first, second, atol=1e-5)
    assert "labels" not in encoder.prompts([row.item])


def test_a_template_that_writes_two_images_for_one_is_refused():
    with pytest.raises(SafeEraserError, match="<image> 2 times for one image"):
        Encoder(FAMILIES["llava"].make_processor(template("<image><image>")))


def test_a_prefix_that_looks_at_the_question_is_said_to(built, sets):
    verdict = check_packing(built("paligemma"), Encoder(FAMILIES["paligemma"].make_processor()), rows(sets)[0])
    assert verdict.route is None and verdict.why.startswith("tokens look at what comes behind them; dense: log-probabilities")


def test_a_kernel_without_a_mask_is_refused_where_a_longer_row_would_need_one(sets):
    "The rows that are tried fit into the window; a row of the context's length would not."
    family = llava_next(window=200)
    model, encoder = family.make_model(), Encoder(family.make_processor())
    assert check_packing(model, encoder, rows(sets)[0], ("split",)).why == "split: some layers look back over a window shorter than 512 tokens"
    assert check_packing(model, encoder, rows(sets)[0]).route == "dense"


def test_image_tokens_that_see_each_other_need_the_mask(built, sets):
    verdict = check_packing(built("gemma3"), Encoder(FAMILIES["gemma3"].make_processor()), rows(sets)[0], ("split",))
    assert verdict.why == "split: image tokens see each other in both directions"


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl", "mllama"])
def test_an_image_behind_the_question_is_not_shared(name, built, sets):
    family = FAMILIES[name]
    behind = template(family.image).replace("in m.content", "in m.content | reverse")
    encoder = Encoder(family.make_processor(chat_template=behind))
    with pytest.raises(CannotPack, match="puts the image behind the question"): Packer(encoder).pack(rows(sets)[0])
    verdict = check_packing(built(name), encoder, rows(sets)[0])
    assert verdict.route is None and verdict.why.count("puts the image behind the question") == 2


@pytest.mark.parametrize("name, ignored", [("llava", "position_ids"), ("qwen2_vl", "position_ids"), ("llava_next", "attention_mask"), ("gemma3", "attention_mask")])
def test_a_model_with_ideas_of_its_own_is_not_packed(name, ignored, built, sets):
    class Odd(type(built(name))):
        def forward(self, *args, **kwargs):
            kwargs.pop(ignored, None)
            return super().forward(*args, **kwargs)
    model = copy.deepcopy(built(name))
    model.__class__ = Odd
    verdict = check_packing(model, Encoder(FAMILIES[name].make_processor()), sum(rows(sets), []))
    assert verdict.route is None and verdict.why and "\n" not in verdict.why


def test_layers_that_are_not_attention_are_not_packed(built, sets):
    model = copy.deepcopy(built("llava"))  # its language model does not read the list
    model.config.get_text_config().layer_types = ["full_attention", "linear_attention"]
    verdict = check_packing(model, Encoder(FAMILIES["llava"].make_processor()), rows(sets)[0])
    assert verdict.route is None and "layers of type linear_attention" in verdict.why


def test_a_record_with_several_images_is_refused():
    record = {"image_path": ["a.png", "b.png"], "SDImage_path": "c.png", "unsafe_pairs": [{"question": "q", "model_response": "a", "sd_response": "b"}]}
    with pytest.raises(SafeEraserError, match="image_path: a text belongs here, found"): parse_record(record, Place(Path("all_train.json"), 0))


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_a_long_packed_row_is_split_and_a_long_question_refused(name, built, sets):
    flat = [r for r in sum(rows(sets), []) if r.item.image_id == "harmful0.png"]
    longest = max(int(Encoder(FAMILIES[name].make_processor()).rows([r])["attention_mask"].sum()) for r in flat)
    encoder = Encoder(FAMILIES[name].make_processor(), max_length=longest)
    made = Packer(encoder, row_tokens=longest + 8).pack(flat, list(range(len(flat))))
    assert len(made) > 1 and sum(len(m.kinds) for m in made) == len(flat)
    use_route(built(name), "dense")
    with torch.no_grad():
        found = packed(built(name), encoder, [made], "dense")
        assert (torch.cat(found) - torch.cat(separate(built(name), encoder, flat))).abs().max() < 1e-5
    with pytest.raises(SafeEraserError, match="harmful0.png, question .*more than max_length"):
        Packer(Encoder(FAMILIES[name].make_processor(), max_length=longest - 1)).pack(flat)


def test_attention_to_the_image_is_left_alone_where_it_has_as_many_tokens_as_the_row():
    "Mllama's cross-attention layers get the same arguments as the others."
    module, (q, k, v) = torch.nn.Module(), torch.randn(3, 1, 2, 6, 8)
    real = torch.where(torch.rand(1, 1, 6, 6) < .5, 0., -1e9)
    found = split_attention(module, q, k, v, real, scaling=.3, packed=Rows([[3, 3]]))[0]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=real, scale=.3).transpose(1, 2)
    torch.testing.assert_close(found, expected)
