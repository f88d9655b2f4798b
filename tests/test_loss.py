"""Formulas against numbers worked out without tensors; what a term asks for, on both routes, against the model asked directly."""
import math
from pathlib import Path

import pytest
import torch
from test_packing import assert_same, jittered, slots_of, step  # noqa: F401 (jittered is a fixture)
from test_trainer import make_trainer

from safeeraser.cache import ReferenceCache
from safeeraser.core import SafeEraserError
from safeeraser.encoder import Collator
from safeeraser.loss import (
    ascend, descend, DECOUPLE, FORGET, METHODS, Needs, Objective, parse_objective, Perturbation, RETAIN, Scores, Term, Tokens)
from safeeraser.model import vanilla
from safeeraser.packed import PackedCollator, use_route
from safeeraser.packing import Packer
from safeeraser.predict import batch_tokens, placed, predict

ANSWERS, BEFORE = [[.5, .2, .9], [.05]], [[.4, .3, .9], [.1]]   # probabilities of two answers' tokens, now and in the vanilla model


def tokens(answers, before=None, requires_grad=False):
    flat = lambda lists: torch.tensor([p for a in lists for p in a], dtype=torch.float64).log()
    item = torch.tensor([i for i, a in enumerate(answers) for _ in a])
    return Tokens(flat(answers).requires_grad_(requires_grad), item, len(answers), ref_logp=before and flat(before))


def mean(values): return sum(values) / len(values)


def by_hand(name, now, before, refusal, refusal_before):
    "One answer's loss, from its tokens' probabilities."
    log = math.log
    ratio = lambda a, b: log(math.prod(a)) - log(math.prod(b))
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    return {"ga": lambda: mean([log(p) for p in now]),
            "npo": lambda: 2 / .1 * log(1 + math.exp(.1 * ratio(now, before))),
            "simnpo": lambda: -2 / 2.5 * log(sigmoid(-2.5 * mean([log(p) for p in now]))),
            "wga": lambda: mean([p * log(p) for p in now]),
            "satimp": lambda: mean([p**5 * (1 - p) * log(p) for p in now]),
            "dpo": lambda: -2 / .1 * log(sigmoid(.1 * (ratio(refusal, refusal_before) - ratio(now, before))))}[name]()


@pytest.mark.parametrize("name", ["ga", "npo", "simnpo", "wga", "satimp", "dpo"])
def test_formulas_by_hand(name):
    refusal, refusal_before = [[.3, .3], [.6]], [[.2, .3], [.9]]
    found = FORGET[name]({"forget": tokens(ANSWERS, BEFORE), "refusal": tokens(refusal, refusal_before)})
    assert found.tolist() == pytest.approx([by_hand(name, *four) for four in zip(ANSWERS, BEFORE, refusal, refusal_before)], rel=1e-9)


def test_undial_by_hand():
    "The teacher's belief in the label divided by e^beta, all beliefs scaled to a sum of 1; then a cross-entropy."
    now, before, label, beta = [[.5, .3, .2], [.1, .1, .8]], [[.7, .2, .1], [.3, .3, .4]], [0, 2], 2.
    log = torch.tensor(now, dtype=torch.float64).log(), torch.tensor(before, dtype=torch.float64).log()
    t = Tokens(log[0][[0, 1], label], torch.tensor([0, 1]), 2, torch.tensor(label), log[1][[0, 1], label], *map(Scores, log))
    for k, loss in enumerate(FORGET["undial"].formula(t, beta=beta).tolist()):
        lowered = [q * math.exp(-beta) if v == label[k] else q for v, q in enumerate(before[k])]
        assert loss == pytest.approx(-sum(q / sum(lowered) * math.log(p) for q, p in zip(lowered, now[k])))


@pytest.mark.parametrize("better", ["refusal", "forget"])
def test_dpo_prefers_the_refusal(better):
    pair = {k: tokens(ANSWERS, BEFORE, requires_grad=True) for k in ("refusal", "forget")}
    FORGET["dpo"](pair).sum().backward()
    assert (pair[better].logp.grad < 0).all() == (better == "refusal")   # descending makes the refusal likelier


@pytest.mark.parametrize("name, weight", [("wga", lambda p: p), ("satimp", lambda p: p**5 * (1 - p))])
def test_weights_are_constants_to_the_gradient(name, weight):
    "Against differences of the sum in which weights stay what they are."
    t = tokens(ANSWERS, requires_grad=True)
    found, = torch.autograd.grad(FORGET[name]({"forget": t}).sum(), t.logp)
    fixed = weight(t.logp.detach().exp())
    value = lambda logp: t.mean(fixed * logp).sum()
    for i, change in enumerate(1e-6 * torch.eye(len(fixed), dtype=torch.float64)):
        assert found[i].item() == pytest.approx(((value(t.logp.detach() + change) - value(t.logp.detach() - change)) / 2e-6).item(), rel=1e-6)


def test_undial_gradient():
    g = torch.Generator().manual_seed(0)
    logits, ref = torch.randn(2, 4, 6, dtype=torch.float64, generator=g)
    item, label = torch.tensor([0, 0, 0, 1]), torch.tensor([1, 5, 0, 3])
    def loss(x): return FORGET["undial"].formula(Tokens(x[:, 0], item, 2, label, scores=Scores(x), ref_scores=Scores(ref)), 3.)
    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


@pytest.mark.parametrize("method", [*METHODS, "0.5 npo(beta=0.5) + kl + 0.25 pd", "satimp(beta1=2.0, beta2=0.5) + ce", "undial + ce"])
def test_an_objective_is_written_as_it_is_read(method):
    objective = parse_objective(method)
    assert parse_objective(repr(objective)) == objective


@pytest.mark.parametrize("method", ["satimp(beta1=-1)", "satimp(beta2=nan)", "undial(beta=0)", "wga(beta=-1)"])
def test_options_that_give_no_loss(method):
    with pytest.raises(SafeEraserError, match="belongs here"): parse_objective(method)


def test_a_formula_returns_a_loss_an_item():
    with pytest.raises(SafeEraserError, match=r"shape \[\] for 2 items"): Term(lambda t: t.logp.mean(), ("forget",))({"forget": tokens(ANSWERS)})


# ---------------------------------------------------------------- what terms ask for

def misdirect(t): return t.mean((t.hidden["layers.0"] - 1).square().mean(-1))
def hold(t): return t.mean((t.hidden["layers.0"] - t.ref_hidden["layers.0"]).square().mean(-1))
def robustly(t): return ascend(t.perturbed)


def reach(layer, size=.1, steps=1): return Needs(perturbation=Perturbation(layer, size, steps))


ASKING = {"hidden": Objective({"rmu": Term(misdirect, ("forget",), Needs(hidden=("layers.0",))),
                               "hold": Term(hold, ("retain",), Needs(reference=True, hidden=("layers.0",)))}, {}),
          "input": Objective({"latent": Term(robustly, ("forget",), reach("embed_tokens", steps=2)), "kl": RETAIN["kl"]}, {}),
          "layer": Objective({"latent": Term(robustly, ("forget",), reach("layers.0")), "pd": DECOUPLE["pd"]}, {"pd": .5})}


@pytest.mark.parametrize("route", ["dense", "split"])
@pytest.mark.parametrize("asking", ASKING)
def test_a_packed_step_gives_what_separate_rows_give(asking, route, jittered, tiny):  # noqa: F811
    (model, encoder), objective = jittered, ASKING[asking]
    slots = slots_of(tiny, objective.kinds)
    expected = step(model, Collator(encoder)(slots), objective)
    use_route(model, route)
    assert_same(expected, step(model, PackedCollator(Packer(encoder), objective.reference_kinds)(slots), objective, route))


@pytest.mark.parametrize("asking", ASKING)
def test_gradient_checkpointing_changes_nothing(asking, jittered, tiny):  # noqa: F811
    (model, encoder), objective = jittered, ASKING[asking]
    batch = Collator(encoder)(slots_of(tiny, objective.kinds, 4))
    model.train()
    expected = step(model, batch, objective)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(expected, step(model, batch, objective))


def test_hidden_states_are_those_that_the_model_returns(jittered, tiny):  # noqa: F811
    "Against `output_hidden_states`, one row at a time; the vanilla model's with the adapter off."
    model, encoder = jittered
    slots = slots_of(tiny, ("forget",), 3)
    needs = Needs(reference=True, hidden=("embed_tokens", "layers.0"))
    found = batch_tokens(model, Collator(encoder)(slots), Objective({"x": Term(descend, ("forget",), needs)}, {}))["forget"]
    for k, (row,) in enumerate(slots):
        inputs = encoder.rows([row])
        at = inputs.pop("labels")[0, 1:] != -100
        with torch.no_grad():
            own = model(**inputs, output_hidden_states=True).hidden_states
            with vanilla(model) as off: before = off(**inputs, output_hidden_states=True).hidden_states
        assert torch.allclose(found.hidden["layers.0"][found.item == k], own[1][0, :-1][at], atol=1e-5)
        assert torch.allclose(found.ref_hidden["layers.0"][found.item == k], before[1][0, :-1][at], atol=1e-5)
        assert torch.allclose(found.hidden["embed_tokens"][found.item == k], own[0][0, :-1][at], atol=1e-5)
    assert not torch.allclose(found.hidden["layers.0"], found.ref_hidden["layers.0"], atol=1e-3)


def test_an_input_is_perturbed_along_the_slope(jittered, tiny):  # noqa: F811
    "Against embeddings that are changed by hand, row by row."
    (model, encoder), size = jittered, .2
    slots = slots_of(tiny, ("forget",), 3)
    objective = Objective({"latent": Term(robustly, ("forget",), reach("embed_tokens", size))}, {})
    found = batch_tokens(model, Collator(encoder)(slots), objective)["forget"].perturbed
    for k, (row,) in enumerate(slots):
        inputs = encoder.rows([row])
        labels, ids = inputs.pop("labels")[0, 1:], inputs.pop("input_ids")
        at = labels != -100
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        def logp(x): return model(inputs_embeds=x, **inputs).logits[0, :-1][at].log_softmax(-1).gather(1, labels[at][:, None])[:, 0]
        slope = torch.autograd.grad(logp(embeddings).mean(), embeddings)[0][0, :-1][at]
        changed = embeddings.detach().clone()
        changed[0, :-1][at] += size * slope / slope.norm(dim=1, keepdim=True)
        with torch.no_grad(): expected, before = logp(changed), logp(embeddings)
        assert torch.allclose(found.logp[found.item == k], expected, atol=1e-4) and expected.mean() > before.mean() + .01


def test_a_search_leaves_no_gradient(jittered, tiny):  # noqa: F811
    model, encoder = jittered
    batch_tokens(model, Collator(encoder)(slots_of(tiny, ("forget",), 2)), ASKING["layer"])
    assert all(p.grad is None for p in model.parameters())


def test_distributions_are_kept_for_those_who_compare_them(jittered, tiny):  # noqa: F811
    (model, encoder), objective = jittered, parse_objective("npo + kl + pd")
    found = batch_tokens(model, Collator(encoder)(slots_of(tiny, objective.kinds)), objective)
    assert {k: (t.log_probs is None, t.ref_log_probs is None, t.ref_logp is None) for k, t in found.items()} == {
        "forget": (True, True, False), "retain": (False, False, False), "decouple": (True, True, True)}
    assert predict(model, placed(Collator(encoder)(slots_of(tiny, ("forget",), 2)))).scores is None


def test_the_cache_of_references_is_not_asked_for_layers(jittered, tiny):  # noqa: F811
    (model, encoder), objective = jittered, ASKING["hidden"]
    use_route(model, "dense")
    batch, = PackedCollator(Packer(encoder), objective.reference_kinds)(slots_of(tiny, objective.kinds, 2))["passes"]
    kept = ReferenceCache(model, 2**20)
    with torch.no_grad(): found, plain = (batch_tokens(model, batch, objective, "dense", k)["retain"] for k in (kept, None))
    assert kept.computed == 0 and torch.equal(found.ref_hidden["layers.0"], plain.ref_hidden["layers.0"])


def test_a_layer_that_does_not_exist(jittered, tiny):  # noqa: F811
    model, encoder = jittered
    objective = Objective({"x": Term(descend, ("forget",), Needs(hidden=("layers.9",)))}, {})
    with pytest.raises(SafeEraserError, match="'layers.9', which the language model does not have"):
        batch_tokens(model, Collator(encoder)(slots_of(tiny, ("forget",), 2)), objective)


def test_two_ways_of_perturbing_one_kind():
    two = Objective({"a": Term(robustly, ("forget",), reach("layers.0")), "b": Term(robustly, ("forget",), reach("layers.1"))}, {})
    with pytest.raises(SafeEraserError, match="one way only"): two.reference_kinds


def test_the_trainer_says_which_step_it_is(tiny, tmp_path):
    seen = []
    def noting(t):
        seen.append(t.step)
        return ascend(t)
    objective = Objective({"noting": Term(noting, ("forget",), Needs(step=True))}, {})
    make_trainer(tiny, tmp_path, "noting", 2, 2, objective=objective, max_steps=3).train()
    assert seen == [0, 0, 1, 1, 2, 2]


RANKS = """
import sys, torch
from types import SimpleNamespace
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_loss import ASKING
from test_trainer import Gradients, make_trainer
tiny, out, accumulation = SimpleNamespace(model=Path(sys.argv[1]), data=Path(sys.argv[2])), Path(sys.argv[3]), int(sys.argv[4])
trainer, seen = make_trainer(tiny, out, "latent", 2, accumulation, objective=ASKING["input"], max_steps=1, ddp_backend="gloo"), Gradients()
trainer.add_callback(seen)
trainer.train()
if trainer.is_world_process_zero(): torch.save(seen.steps, out / "gradients.pt")
"""


@pytest.mark.slow
def test_two_processes_perturb_as_one_does(tiny, tmp_path, run_python):
    script, found = tmp_path / "ranks.py", []
    script.write_text(RANKS.format(tests=str(Path(__file__).parent)))
    for ranks, accumulation in ((1, 4), (2, 2)):
        out = tmp_path / str(ranks)
        out.mkdir()
        done = run_python(str(script), tiny.model, tiny.data, out, accumulation,
                          launcher=("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"))
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(out / "gradients.pt")[0])
    assert found[0].keys() == found[1].keys() and max(g.norm() for g in found[0].values()) > 1e-4
    for name, g in found[0].items(): assert (g - found[1][name]).norm() <= 1e-3 * g.norm() + 1e-7, name
