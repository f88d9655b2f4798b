"""What research may bring to a run: sets, extra questions, fresh modules, start weights, a model in memory, a trainer, callbacks."""
import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from safeeraser.core import SafeEraserError
from safeeraser.data import load_refusals, load_sets
from safeeraser.encoder import Encoder
from safeeraser.loss import parse_objective
from safeeraser.model import add_adapter, load_model
from safeeraser.settings import make_config
from safeeraser.slots import epoch_plan, extra_items, KINDS, Row, SlotDataset
from safeeraser.trainer import draw_anew, make_trainable, plan_text, probe, unlearn, UnlearnTrainer

SMALL = dict(seed=3, progress=False, max_steps=2, learning_rate=1e-2, lora_r=4, lora_alpha=8, lora_dropout=0.0, use_cpu=True, save_strategy="no",
             per_device_train_batch_size=4, gradient_accumulation_steps=1, warmup_steps=0, logging_steps=1)
MLP = "model.language_model.layers.1.mlp"


@pytest.fixture(scope="module")
def more(tiny):
    "The sets with five extra questions about other pictures."
    sets = load_sets(tiny.data)
    return replace(sets, extra=extra_items((sets.decouple[k].image, f"what is number {k} ?", "a fox" * (k + 1)) for k in range(5)))


def adapter(out): return load_file(out / "adapter_model.safetensors")


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_sets_and_a_model_in_memory_train_what_folders_train(tiny, tmp_path):
    unlearn(tiny.model, tiny.data, tmp_path / "folders", "po+pd", **SMALL)
    run = unlearn(load_model(tiny.model, "cpu"), load_sets(tiny.data), tmp_path / "memory", "po+pd", refusals=load_refusals(tiny.data), **SMALL)
    assert same(adapter(tmp_path / "folders"), adapter(tmp_path / "memory"))
    told = json.loads((tmp_path / "folders" / "run.json").read_text())
    assert "research" not in told and "research" not in run and told.keys() == run.keys()
    assert run["model"] == told["model"] and run["data"].startswith("sets ") and run["model_fingerprint"] == told["model_fingerprint"]


def test_a_run_on_sets_goes_on_and_knows_other_sets(tiny, more, tmp_path):
    again = lambda sets: unlearn(tiny.model, sets, tmp_path / "run", "ga + extra", **SMALL)
    assert again(more) == again(more)
    other = replace(more, extra=[replace(more.extra[0], answer="a hen"), *more.extra[1:]])
    with pytest.raises(SafeEraserError, match="holds another run .data was"): again(other)


def test_a_whole_model_that_was_never_in_a_folder_is_saved_with_its_processor(tiny, tmp_path):
    from safeeraser.tiny_llava import BaseConfig, build_model
    pair = build_model(BaseConfig(width=32, vision_width=32))
    unlearn(pair, load_sets(tiny.data), tmp_path / "run", "ga", **SMALL, tuning="full")
    model, processor = load_model(tmp_path / "run", "cpu")
    assert same(dict(model.state_dict()), dict(pair[0].state_dict())) and processor.tokenizer.get_vocab() == pair[1].tokenizer.get_vocab()


def test_extras_ride_along_and_move_nothing_else():
    about, harmless = ["a", "a", "b", "c"] * 3, ["a", "c", "z"]
    for together in (False, True):
        plain, laden = (epoch_plan(about, harmless, 3, 7, 1, 5, together, n_extra=n) for n in (0, 20))
        assert plain == [replace(s, extra=()) for s in laden]
        dealt = [len(s.extra) for s in laden if s.live]
        assert sorted(i for s in laden for i in s.extra) == list(range(20)) and max(dealt) - min(dealt) <= 1
    assert [s.extra for s in epoch_plan(about, [], 0, 7, 1, n_extra=5)] != [s.extra for s in epoch_plan(about, [], 0, 7, 2, n_extra=5)]


class Gradients(TrainerCallback):
    def __init__(self): self.steps = []
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("batch, accumulation, packing", [(4, 1, "off"), (1, 4, "off"), (2, 2, "dense")])
def test_the_extra_term_is_the_mean_cross_entropy_of_single_rows(batch, accumulation, packing, tiny, more, tmp_path):
    "Row by row through transformers' own loss; extras have items of their own to be a mean over."
    seen = Gradients()
    settings = SMALL | {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 1, "max_grad_norm": 0., "packing": packing}
    unlearn(tiny.model, more, tmp_path / "run", "idk + 2 extra", refusals=load_refusals(tiny.data), callbacks=[seen], **settings, group_images=False)
    model, processor = load_model(tiny.model, "cpu")
    adapted, encoder = add_adapter(model, 4, 8, 0.0, 3), Encoder(processor)
    images = lambda items: [i.image_id for i in items]
    plan = epoch_plan(images(more.forget), images(more.retain), len(load_refusals(tiny.data)), 3, 0, n_extra=5)[:4]
    rows = [r for slot in plan for r in SlotDataset(more, load_refusals(tiny.data))[slot]]
    for kind, weight in (("refusal", 1), ("extra", 2)):
        own = [r for r in rows if r.kind == kind]
        assert own
        for row in own: (weight * adapted(**encoder.rows([row])).loss / len(own)).backward()
    expected = {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}
    assert expected.keys() == seen.steps[0].keys()
    for name, g in expected.items(): assert (g - seen.steps[0][name]).norm() <= 1e-4 * g.norm() + 1e-8, name


def test_an_extra_term_wants_extra_rows_that_fit(tiny, more, tmp_path):
    with pytest.raises(SafeEraserError, match="has an extra term, but there is no extra question"):
        unlearn(tiny.model, tiny.data, tmp_path / "run", "idk + extra", **SMALL)
    long = replace(more, extra=[replace(more.extra[0], answer="a fox " * 300)])
    with pytest.raises(SafeEraserError, match="max_length"): unlearn(tiny.model, long, tmp_path / "run", "ga + extra", **SMALL, max_length=200)
    assert not (tmp_path / "run").exists() and KINDS[:4] == ("forget", "refusal", "retain", "decouple")


def test_modules_drawn_anew_and_nothing_else(tiny):
    vanilla, _ = load_model(tiny.model, "cpu")
    def fresh(seed, *names):
        model, state = copy.deepcopy(vanilla), torch.get_rng_state()
        draw_anew(model, names, seed)
        assert torch.equal(state, torch.get_rng_state())
        return dict(model.state_dict())
    a, b, c = fresh(1, MLP), fresh(1, MLP), fresh(2, MLP)
    assert same(a, b) and not same(a, c)
    before = dict(vanilla.state_dict())
    changed = {n for n in before if not torch.equal(before[n], a[n])}
    assert changed == {n for n in before if n.startswith(MLP) and n.endswith("proj.weight")} and changed
    spread = torch.cat([a[n].flatten() for n in changed])
    assert abs(spread.mean()) < 1e-3 and spread.std().item() == pytest.approx(vanilla.config.get_text_config().initializer_range, rel=.05)
    both = fresh(1, MLP, MLP.replace("1", "0"))
    assert not torch.equal(both[f"{MLP}.up_proj.weight"], both[f"{MLP.replace('1', '0')}.up_proj.weight"])
    norm = "model.language_model.layers.0.input_layernorm"
    with torch.no_grad(): vanilla.get_submodule(norm).weight.fill_(3.)
    assert fresh(1, norm)[f"{norm}.weight"].eq(1).all()  # the model's own rule for a norm


def test_fresh_modules_in_a_run(tiny, tmp_path):
    run = lambda name, **more: unlearn(tiny.model, tiny.data, tmp_path / name, "ga", **SMALL | {"learning_rate": 0.0}, tuning="full", **more)
    told = run("a", fresh=[MLP])
    run("b", fresh=[MLP]), run("plain")
    a, b, plain = (dict(load_model(tmp_path / n, "cpu")[0].state_dict()) for n in ("a", "b", "plain"))
    assert same(a, b) and told["research"] == {"fresh": [MLP]}
    assert {n for n in a if not torch.equal(a[n], plain[n])} == {n for n in a if n.startswith(MLP) and n.endswith("weight")}
    with pytest.raises(SafeEraserError, match="holds another run .research was"): run("plain", fresh=[MLP])
    with pytest.raises(SafeEraserError, match="did you mean model.language_model.layers.1.mlp"): run("c", fresh=["model.language_model.layers.1.mlq"])
    with pytest.raises(SafeEraserError, match="need tuning='full'"): unlearn(tiny.model, tiny.data, tmp_path / "d", "ga", **SMALL, fresh=[MLP])


def test_the_reference_is_vanilla_though_the_start_is_not(tiny, tmp_path):
    vanilla, _ = load_model(tiny.model, "cpu")
    args = make_config(tmp_path, method="kl", tuning="full", reference_copy=True, use_cpu=True, seed=1)
    trained = make_trainable(copy.deepcopy(vanilla), args, parse_objective("kl"), start={f"{MLP}.up_proj.weight": torch.ones_like(vanilla.get_parameter(f"{MLP}.up_proj.weight"))},
                             fresh=[MLP.replace("1", "0")])
    assert same(dict(trained.vanilla_copy.state_dict()), dict(vanilla.state_dict()))
    assert trained.get_parameter(f"{MLP}.up_proj.weight").eq(1).all()


def test_start_weights(tiny, tmp_path):
    unlearn(tiny.model, tiny.data, tmp_path / "first", "po", **SMALL)
    still = SMALL | {"learning_rate": 0.0, "weight_decay": 0.0}
    run = unlearn(tiny.model, tiny.data, tmp_path / "second", "po", **still, start=adapter(tmp_path / "first"))
    assert same(adapter(tmp_path / "first"), adapter(tmp_path / "second")) and run["research"].keys() == {"start"}
    wrong = {k: v[:1] for k, v in adapter(tmp_path / "first").items()}
    with pytest.raises(SafeEraserError, match="in the model"): unlearn(tiny.model, tiny.data, tmp_path / "third", "po", **SMALL, start=wrong)
    with pytest.raises(SafeEraserError, match="start: the model has no weight 'x'"): unlearn(tiny.model, tiny.data, tmp_path / "third", "po", **SMALL, start={"x": torch.ones(1)})


class Twice(UnlearnTrainer):
    def pass_loss(self, *args, **kwargs):
        made = super().pass_loss(*args, **kwargs)
        return replace(made, loss=2 * made.loss)


def test_a_trainer_and_callbacks_of_one_s_own(tiny, tmp_path):
    gradients = {}
    for trainer in (UnlearnTrainer, Twice):
        seen = Gradients()
        run = unlearn(tiny.model, tiny.data, tmp_path / trainer.__name__, "ga", trainer_class=trainer, callbacks=[seen], **SMALL, max_grad_norm=0.)
        gradients[trainer] = seen.steps[0]
    assert run["research"]["trainer"].endswith("Twice") and run["research"]["callbacks"][0].endswith("Gradients")
    for name, g in gradients[UnlearnTrainer].items(): assert torch.allclose(2 * g, gradients[Twice][name], rtol=1e-5)


def test_a_probe_leaves_no_trace(tiny, tmp_path, monkeypatch):
    "The plan's trial step changes neither what is logged nor what is trained."
    quiet = unlearn(tiny.model, tiny.data, tmp_path / "quiet", "gd+pd", **SMALL)
    train = UnlearnTrainer.train
    def probed(self, **kwargs):
        probe(self), plan_text(self)
        assert self.tally.shares == {} and self.tally.steps == 0
        train(self, **kwargs)
    monkeypatch.setattr(UnlearnTrainer, "train", probed)
    loud = unlearn(tiny.model, tiny.data, tmp_path / "loud", "gd+pd", **SMALL)
    logged = lambda run: [{k: h[k] for k in ("loss", "ga", "ce", "pd")} for h in run["history"] if "loss" in h]
    assert logged(quiet) == logged(loud) and same(adapter(tmp_path / "quiet"), adapter(tmp_path / "loud"))


def test_rows_of_all_kinds_in_their_order(tiny, more):
    rows = SlotDataset(more, ["no"])[next(s for s in epoch_plan(["x"] * 11, ["x"] * 6, 1, 0, 0, n_extra=5) if s.extra and s.retain)]
    assert [r.kind for r in rows][:3] == ["forget", "refusal", "decouple"] and {r.kind for r in rows} == set(KINDS)
    assert all(isinstance(r, Row) and r.answer for r in rows)
