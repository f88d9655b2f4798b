"""A plan counts what training allocates, packs what the trainer packs, and says what fits; checkpointing follows from peak and card."""
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from command import command as call

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import plan as benchmark  # noqa: E402
import safeeraser.trainer  # noqa: E402
from safeeraser.core import SafeEraserError  # noqa: E402
from safeeraser.data import load_refusals, load_sets  # noqa: E402
from safeeraser.loss import parse_objective  # noqa: E402
from safeeraser.model import add_adapter, load_model  # noqa: E402
from safeeraser.packed import use_route  # noqa: E402
from safeeraser.plan import (BlankEncoder, Card, Choice, count_pass, FOUR_BITS, ghost_of, GPUS, in_words, llava_config, on_gpus, plan,  # noqa: E402
                             plan_of, shape_of, survey, utilisation, weight_parts, with_command)
from safeeraser.processors import skeleton  # noqa: E402
from safeeraser.settings import make_config, preset  # noqa: E402
from safeeraser.slots import SlotDataset  # noqa: E402
from safeeraser.trainer import decide_checkpointing, make_trainable, settle_checkpointing, unlearn, UnlearnTrainer  # noqa: E402
from shape import build_processor  # noqa: E402

WITHIN = .15  # of what was allocated
SMALL = dict(seed=1, progress=False, lora_r=2, use_cpu=True, warmup_steps=0, save_strategy="no", max_steps=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory): return benchmark.tiny(tmp_path_factory.mktemp("plan"))


@pytest.mark.parametrize("case", [c for c in benchmark.CASES if c.get("packing") == "split"] + [{"packing": "off", "gradient_checkpointing": True}], ids=str)
def test_what_is_counted_is_what_a_cpu_allocates(case, made):
    "By the allocator's own events, which the count knows nothing of."
    assert abs(benchmark.compared("tiny", made, **case)["ratio"] - 1) < .05


@pytest.mark.slow
@pytest.mark.parametrize("case", [{"packing": "split"}, {"packing": "split", "tuning": "full"}], ids=str)
def test_so_it_is_for_a_hundred_million_weights(case, tmp_path):
    assert abs(benchmark.compared("middle", benchmark.middle(tmp_path), **case)["ratio"] - 1) < WITHIN


def test_committed_figures_are_within_the_promise():
    rows = json.loads(benchmark.OUT.read_text())["rows"]
    assert {r["model"] for r in rows} == {"tiny", "middle"} and len(rows) >= 15
    assert all(abs(r["predicted_mib"] / r["allocated_mib"] - 1) < WITHIN for r in rows)


def test_packed_work_is_what_the_trainer_lays_out(tiny, tmp_path):
    "Every pass of the trainer's own first epoch, images decoded and all."
    settings = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, group_images=True, packing="dense", lora_r=2, use_cpu=True)
    args, objective, sets, refusals = make_config(tmp_path, **settings), parse_objective("kl+pd"), load_sets(tiny.data), load_refusals(tiny.data)
    model, processor = load_model(tiny.model, "cpu")
    work, _ = survey(BlankEncoder(processor, model.config.text_config.max_position_embeddings), SlotDataset(sets, refusals, objective.kinds), args, objective)
    trainer = UnlearnTrainer(make_trainable(model, args, objective), args, sets, refusals, processor, objective)
    passes = [p for batch in trainer.get_train_dataloader() for p in batch["passes"]]
    assert work.passes == len(passes) and work.tokens == sum(p["input_ids"].numel() for p in passes)
    assert work.asked == sum(p["reference"]["input_ids"].numel() for p in passes if p["reference"])
    assert work.steps == trainer.planned_steps() and work.packing == "dense"


def test_separate_work_is_what_the_trainer_lays_out(tiny, tmp_path):
    settings = dict(per_device_train_batch_size=3, gradient_accumulation_steps=2, packing="off", lora_r=2, use_cpu=True)
    args, objective, sets, refusals = make_config(tmp_path, **settings), parse_objective("po+pd"), load_sets(tiny.data), load_refusals(tiny.data)
    model, processor = load_model(tiny.model, "cpu")
    work, heaviest = survey(BlankEncoder(processor, model.config.text_config.max_position_embeddings), SlotDataset(sets, refusals, objective.kinds), args, objective)
    trainer = UnlearnTrainer(make_trainable(model, args, objective), args, sets, refusals, processor, objective)
    batches = list(trainer.get_train_dataloader())
    assert work.tokens == sum(b["input_ids"].numel() for b in batches) and work.rows == sum(int(b["n_items"].sum()) for b in batches) + 2  # a dead slot
    assert heaviest[0]["input_ids"].numel() == max(b["input_ids"].numel() for b in batches) and work.steps == trainer.planned_steps()


def test_four_bits_are_what_bitsandbytes_keeps(tiny):
    pytest.importorskip("bitsandbytes")
    real, config = load_model(tiny.model, "cpu", four_bit=True)[0], shape_of(tiny.model)[0]
    packed = [m.weight for m in real.modules() if type(m).__name__ == "Linear4bit"]
    weights = sum(math.prod(w.quant_state.shape) for w in packed)
    kept = sum(w.nbytes + w.quant_state.absmax.nbytes + w.quant_state.state2.absmax.nbytes for w in packed)
    assert abs(kept / (weights * FOUR_BITS) - 1) < .05  # a tiny layer's last block is not full
    ghost = ghost_of(config, make_config(Path("unused"), lora_r=2, use_cpu=True), parse_objective("ga"))
    saved = 2**30 * (weight_parts(ghost)["frozen weights"] - weight_parts(ghost, True)["frozen weights"])
    assert saved == pytest.approx(weights * (4 - FOUR_BITS))


@pytest.fixture(scope="module")
def broad():
    "LLaVA-1.5-7B with a few of its layers, and a record of it packed: how much is held, by number of layers."
    def held(layers, checkpointing=False, method="po+pd"):
        config, objective = llava_config("llava-hf/llava-1.5-7b-hf"), parse_objective(method)
        config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers = layers, 2
        args = make_config(Path("unused"), bf16=True, use_cpu=True, per_device_train_batch_size=4, gradient_accumulation_steps=1, group_images=True)
        ghost = ghost_of(config, args, objective)
        use_route(ghost, "split")
        return ghost, count_pass(ghost, batch, objective, args, "split", checkpointing)
    import tempfile
    from shape import SHAPES
    with tempfile.TemporaryDirectory() as folder:
        sets, objective = benchmark.sets_of(Path(folder) / "data", SHAPES["7b"], 100, 1), parse_objective("po+pd")
        args = make_config(Path("unused"), use_cpu=True, per_device_train_batch_size=4, gradient_accumulation_steps=1, group_images=True)
        batch = survey(BlankEncoder(build_processor(SHAPES["7b"])), SlotDataset(sets, ["w70 w71"], objective.kinds), args, objective)[1][0]
    return held, batch["input_ids"].numel()


def test_a_7b_has_the_weights_and_the_adapter_that_it_is_known_for():
    with torch.device("meta"): adapted = add_adapter(skeleton(llava_config("llava-hf/llava-1.5-7b-hf")))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    lora = 32 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))          # layers, rank, both matrices of four square and three oblong layers
    projector = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert trained == lora + projector and sum(p.numel() for p in adapted.parameters()) == 7_063_427_072 + trained


def test_activations_of_a_7b_grow_by_the_layer_and_with_checkpointing_hardly(broad):
    held, tokens = broad
    (_, two), (_, four) = held(2), held(4)
    a_layer = (four.gib["activations"] - two.gib["activations"]) / 2 * 2**30 / tokens
    assert 32 * a_layer * 1100 / 2**30 == pytest.approx(8.0, rel=.05)  # counted otherwise, of saved tensors alone
    growth = lambda checkpointing: sum(held(4, checkpointing)[1].gib.values()) - sum(held(2, checkpointing)[1].gib.values())
    assert 0 < growth(True) < .1 * growth(False)


def test_operations_are_two_a_weight_and_token_forward_and_as_many_back(broad):
    held, tokens = broad
    ghost, plain = held(2)
    linear = sum(p.numel() for n, p in ghost.named_parameters() if "layers" in n and "language_model" in n and p.ndim == 2)
    attention = 2 * 2 * 2 * tokens**2 * 4096  # at most: two layers, two products
    assert 2 * linear * tokens < plain.flops["activations"] < 2.1 * linear * tokens + attention
    again = held(2, True)[1]
    assert again.flops["backward"] - plain.flops["backward"] == pytest.approx(plain.flops["activations"], rel=.05)


def test_several_gpus_share_a_whole_model_and_repeat_an_adapter():
    alone = {"frozen weights": 8., "trained weights": 4., "optimizer": 8., "gradients": 4., "activations": 5.}
    assert on_gpus(alone, 1, True, 1.) == alone
    assert sum(on_gpus(alone, 4, False, 1.).values()) == sum(alone.values()) + 4
    assert sum(on_gpus(alone, 4, True, 1.).values()) == 24 / 4 + 5 + 2


def test_hours_are_operations_over_what_a_card_does(monkeypatch):
    card, choice = Card(1., 100e12, 1e12), Choice("lora", False, {}, {"flops": 3600 * 50e12, "bytes": 0.})
    assert choice.hours(card, 1, .5) == pytest.approx(1) and choice.hours(card, 2, .5) == pytest.approx(.5)
    assert Choice("lora", False, {}, {"flops": 1., "bytes": 7200e12}).hours(card, 1, .5) == pytest.approx(2)


def test_a_measured_utilisation_goes_before_an_assumed_one(tmp_path):
    assert utilisation(tmp_path / "gpu.json")[1].startswith("an assumption")
    rows = [{"work": "train", "model_flop_utilisation": u} for u in (.2, .4, .3)] + [{"work": "generate"}]
    (tmp_path / "gpu.json").write_text(json.dumps({"rows": rows}))
    assert utilisation(tmp_path / "gpu.json")[0] == .3


@pytest.fixture(scope="module")
def planned(tiny): return plan(tiny.model, tiny.data, "3090-24", method="kl+pd", lora_r=2)


def test_a_plan_reads_no_weights(tiny, tmp_path):
    for file in tiny.model.iterdir():
        if file.suffix != ".safetensors": (tmp_path / file.name).write_bytes(file.read_bytes())
    assert plan(tmp_path, tiny.data, method="ga", lora_r=2).weights == sum(p.numel() for p in load_model(tiny.model, "cpu")[0].parameters())


def test_a_plan_is_read_back_and_names_the_command(planned):
    again = plan_of(json.loads(json.dumps(planned.as_json())))
    assert again == planned and planned.command.startswith("safeeraser unlearn --model") and "tuning" not in planned.command
    assert {(c.tuning, c.checkpointing) for c in planned.choices} == {(t, on) for t in ("lora", "qlora", "full") for on in (False, True)}


@pytest.mark.parametrize("gib, tail", [({"lora": 99., "qlora": 9.}, "--set tuning=qlora"), ({"lora": 9., "qlora": 5.}, "x"), ({"lora": 99., "qlora": 99.}, None)])
def test_the_first_way_that_fits_is_taken(gib, tail, planned):
    from dataclasses import replace
    choices = [Choice(t, False, {"activations": n}, {"flops": 1., "bytes": 1.}) for t, n in gib.items()]
    command = with_command(replace(planned, choices=choices), ["x"]).command
    assert command is None if tail is None else command.endswith(tail)


def test_texts_become_as_many_words_as_they_have_tokens_about(tiny):
    sets = load_sets(tiny.data)
    words, said = in_words(sets, ["a" * 9])
    assert said == ["w w w"] and len(words.forget) == len(sets.forget)
    assert len(words.forget[0].answer.split()) == math.ceil(len(sets.forget[0].answer) / 4)


@pytest.mark.parametrize("peak, memory, on", [(None, 0., False), (35.9, 40., False), (36.1, 40., True), (math.inf, 80., True), (41., 79.1, False)])
def test_checkpointing_is_decided_from_peak_and_memory(peak, memory, on):
    assert decide_checkpointing(None, peak, memory).on is on
    assert decide_checkpointing(True, peak, memory).on and not decide_checkpointing(False, peak, memory).on


class Fake:
    "A trainer as far as the decision looks at it."
    def __init__(self, asked=None):
        from types import SimpleNamespace
        self.args = SimpleNamespace(gradient_checkpointing=asked, use_cpu=False, device="cpu")
        self.accelerator = SimpleNamespace(gather=lambda own: torch.cat([own, torch.tensor([[30., 40.]])]))  # another rank with room


@pytest.mark.parametrize("peaks, on", [((20.,), False), ((39., 12.), True), ((torch.OutOfMemoryError(), 12.), True)])
def test_the_longest_step_decides_on_a_gpu(peaks, on, monkeypatch):
    asked = []
    def probe(trainer, checkpointing=False):
        found = peaks[len(asked)]
        asked.append(checkpointing)
        if isinstance(found, Exception): raise found
        return {"seconds_per_step": 1., "peak_gib": found}
    monkeypatch.setattr(safeeraser.trainer, "probe", probe)
    monkeypatch.setattr(safeeraser.trainer, "card_gib", lambda: 40.)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    trainer = Fake()
    choice, cost = settle_checkpointing(trainer)
    assert (choice.on, trainer.args.gradient_checkpointing, cost["peak_gib"]) == (on, on, peaks[-1]) and asked == [False, True][:len(peaks)]
    kept = Fake()
    assert settle_checkpointing(kept, {"on": not on, "why": "as before"})[0].on is not on and kept.args.gradient_checkpointing is not on


@pytest.mark.parametrize("asked, on, why", [(None, False, "no GPU to fill"), (True, True, "as set"), (False, False, "as set")])
def test_the_decision_is_said_and_recorded_and_kept(asked, on, why, tiny, tmp_path, capsys):
    settings = SMALL | {"progress": True, "save_strategy": "steps", "save_steps": 1} | ({} if asked is None else {"gradient_checkpointing": asked})
    record = unlearn(tiny.model, tiny.data, tmp_path / "run", "ga", **settings)
    assert record["gradient_checkpointing"] == {"on": on, "why": why}
    assert f"gradient checkpointing {'on' if on else 'off'} ({why})" in capsys.readouterr().out
    record["finished"], record["gradient_checkpointing"] = False, {"on": True, "why": "kept"}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert unlearn(tiny.model, tiny.data, tmp_path / "run", "ga", **settings)["gradient_checkpointing"] == {"on": True, "why": "kept"}


def test_presets_leave_checkpointing_to_the_card(): assert all("gradient_checkpointing" not in preset(p)["settings"] for p in ("paper-7b", "paper-13b"))


def test_the_command_plans_and_says_what_to_type(tiny, tmp_path):
    typed = ("plan", "--model", tiny.model, "--data", tiny.data, "--gpu", "A100-40", "--set", "lora_r=2")
    done = call(*typed)
    assert done.returncode == 0 and "fits A100-40" in done.stdout and "an assumption" in done.stdout
    assert done.stdout.splitlines()[-1] == f"next: safeeraser unlearn --model {tiny.model} --data {tiny.data} --method po+pd --set lora_r=2"
    assert json.loads(call(*typed, "--json").stdout)["gpu"] == "A100-40"


@pytest.mark.parametrize("argv, said", [
    (["--gpu", "H100"], "unknown gpu 'H100', did you mean H100-80?"), (["--gpu", "TPU"], f"unknown gpu 'TPU'; there are: {', '.join(GPUS)}"),
    (["--gpus", "0"], "greater than or equal to 1"), (["--model", "{tmp}"], "no config.json there"), (["--data", "{tmp}"], "all_train.json"),
    (["--method", "pq"], "pq"), (["--set", "lora_rr=2"], "did you mean lora_r?"), (["--model", "nobody/nothing"], "no configuration there")])
def test_bad_input_is_one_sentence(argv, said, tiny, tmp_path):
    given = {"--model": tiny.model, "--data": tiny.data} | dict(zip(argv[::2], (a.format(tmp=tmp_path) for a in argv[1::2])))
    done = call("plan", *(word for pair in given.items() for word in pair))
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


def test_no_gpu_at_all_is_refused_in_python(tiny):
    with pytest.raises(SafeEraserError, match="gpus=0: at least 1"): plan(tiny.model, tiny.data, gpus=0)
