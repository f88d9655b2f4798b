"""The benchmark compares loops that do the same work, and counts what it says it counts."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import loops  # noqa: E402
from measure import ratios  # noqa: E402
from safeeraser.encoder import Encoder  # noqa: E402
from safeeraser.loss import parse_objective  # noqa: E402
from safeeraser.model import add_adapter  # noqa: E402
from shape import asked, build_model, build_processor, generation_limit, make_records, SHAPES, token_counts, token_limit, tokens_of  # noqa: E402

KEYS = {"work", "baseline", "method", "mean_answer_tokens", "records_per_safe_image", "images_per_batch", "ratio", "ratio_min", "ratio_max", "token_limit", "peak_memory_ratio"}
TINY, CPU = SHAPES["tiny"], SHAPES["cpu"]
LOOPS = {"published": loops.published, "unpacked": loops.unpacked, "packed": loops.packed}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A tiny model whose adapter already does something, its encoder, and two records that share a safe image."
    model, folder = add_adapter(build_model(TINY), 4, 8, 0.0).train(), tmp_path_factory.mktemp("images")
    g = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name: p.data = .1 * torch.randn(p.shape, generator=g)
    return model, Encoder(build_processor(TINY)), make_records(folder, TINY, 12, 2, per_safe_image=2)


def step_of(name: str, small, method: str):
    model, encoder, records = small
    step = LOOPS[name](model, encoder, parse_objective(method), records)
    loss = step()
    return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("method, loops_alike", [("gd+pd", ("published", "unpacked", "packed")), ("po+pd", ("published", "unpacked", "packed")), ("kl+pd", ("unpacked", "packed"))])
def test_loops_take_the_same_step(method, loops_alike, small):
    (loss, gradient), *others = [step_of(name, small, method) for name in loops_alike]
    assert gradient.norm() > 0
    for other_loss, other in others:
        assert other_loss == pytest.approx(loss, abs=1e-5)
        assert (other - gradient).norm() < 1e-4 * gradient.norm()


def test_the_published_kl_is_over_all_positions(small):
    assert abs(step_of("published", small, "kl")[0] - step_of("unpacked", small, "kl")[0]) > 1e-3


@pytest.mark.parametrize("name, looks, all_positions", [("published", 24, True), ("unpacked", 3, False), ("packed", 3, False)])
def test_what_a_loop_computes(name, looks, all_positions, small):
    model, encoder, records = small
    base, images, positions = model.get_base_model(), [], []
    tower = base.model.vision_tower
    seen = tower.vision_model.embeddings if hasattr(tower, "vision_model") else tower.embeddings
    hooks = [seen.register_forward_hook(lambda m, args, out: images.append(len(args[0]))),
             base.lm_head.register_forward_hook(lambda m, args, out: positions.append(out.shape[:-1].numel() * (out.shape[-1] == m.out_features)))]  # it may pass states on
    step_of(name, small, "gd+pd")
    for hook in hooks: hook.remove()
    rows = [row for r in records for row in r.rows(parse_objective("gd+pd"))]
    labels = sum(encoder.texts(r.item.question, r.answer)[2] for r in rows)
    assert sum(images) == looks
    everything = sum(sum(tokens_of(r, encoder)) for r in rows)
    assert sum(positions) == everything if all_positions else labels <= sum(positions) < everything / 3


def test_counts_follow_the_formula(small):
    _, encoder, records = small
    prefix = tokens_of(records[0].forget[0], encoder)[0]
    assert prefix == len(encoder.rows([records[0].forget[0]])["input_ids"][0]) - tokens_of(records[0].forget[0], encoder)[1]
    behind = {k: sum(tokens_of(r, encoder)[1] for rec in records for r in getattr(rec, k)) for k in ("forget", "retain", "decouple")}
    apart, shared = token_counts(records, parse_objective("kl+pd"), encoder)
    assert apart == 24 * prefix + sum(behind.values()) + (8 * prefix + behind["retain"]) / 2
    assert shared == 3 * prefix + sum(behind.values()) + (2 * prefix + behind["retain"]) / 2
    assert token_limit(records, parse_objective("kl+pd"), encoder) == apart / shared
    items = asked(records)
    assert len(items) == 2 * 20
    texts = sum(tokens_of(r, encoder)[1] - len(encoder.processor.tokenizer(r.answer).input_ids) for rec in records for k, n in (("forget", 3), ("retain", 1), ("decouple", 1))
                for r in getattr(rec, k) for _ in range(n))
    assert generation_limit(items, encoder, 10) == pytest.approx((40 * (prefix + 10) + texts) / (3 * prefix + 400 + texts), rel=.02)


def test_the_fixed_shape(tmp_path):
    encoder, records = Encoder(build_processor(CPU)), make_records(tmp_path, CPU, 100, 60)
    assert tokens_of(records[0].forget[0], encoder)[0] == 23 + 576
    length = lambda kind: torch.tensor([len(r.answer.split()) for rec in records for r in getattr(rec, kind)], dtype=torch.float)
    assert length("forget").mean() == pytest.approx(100, rel=.06) and length("retain").mean() == pytest.approx(70, rel=.06)
    assert length("forget").log().std() == pytest.approx(.4, rel=.15) and set(length("refusal").tolist()) == {12}
    assert records == make_records(tmp_path, CPU, 100, 60) != make_records(tmp_path, CPU, 100, 60, seed=1)


def test_both_ways_of_generating_answer_alike(small):
    _, encoder, records = small
    model, items = build_model(TINY), asked(records[:1])
    plain = loops.generate_published(model, encoder, items, 6)
    assert loops.generate_shared(model, encoder, items, 6) == plain and all(len(t.split()) >= 5 for t in plain)


def test_ratios_are_of_neighbours():
    assert ratios([2., 9., 4.], [1., 3., 4.]) == {"ratio": 2., "ratio_min": 1., "ratio_max": 3.}


def test_utilisation():
    assert gpu.utilisation(7_000_000_000, 1000, .1, "NVIDIA H100 80GB HBM3") == pytest.approx(.2831, abs=1e-4)
    assert gpu.utilisation(1, 1, 1, "cpu") is None


def test_the_gpu_script_says_the_first_thing_first_and_writes_as_it_goes(monkeypatch):
    monkeypatch.setattr(gpu, "CASES", [("gd+pd", 12)])
    monkeypatch.setattr(gpu, "NEW_TOKENS", 4)
    said = []
    found = gpu.measure("tiny", "cpu", 600, lambda now: said.append(json.loads(json.dumps(now))))
    assert [len(s["rows"]) for s in said] == list(range(7)) and not found["left_out"]
    first, (train, sample, vision, load, *generate) = said[0]["first"], found["rows"]
    assert first["route"] in ("split", "dense") and first["pass_seconds"] > 0 and said[0]["environment"]["shape"] == "tiny"
    assert KEYS <= train.keys() and all(KEYS - {"token_limit", "peak_memory_ratio"} <= g.keys() for g in generate) and len(generate) == 2
    assert sample["milliseconds"] > 0 < vision["milliseconds_from_the_cache"] and load["without_workers"][1] > load["without_workers"][0] and len(load["with_four"]) == 2


def test_the_gpu_script_begins_nothing_when_its_time_is_up(capsys):
    said = []
    found = gpu.measure("tiny", "cpu", 0, lambda now: said.append(len(now["left_out"])) or gpu.told(now, "cpu"))
    assert found["first"]["pass_seconds"] > 0 and not found["rows"] and said == list(range(15))
    assert found["left_out"] == [*(f"{m} {n}" for m, n in gpu.CASES), "sample", "vision", "load", "generate 1", "generate 4"] and found["left_out"][0] == "gd+pd 100"
    first, *late = capsys.readouterr().out.splitlines()
    assert '"pass_seconds"' in first and late == [f"no time for {name}" for name in found["left_out"]]


def test_a_peak_is_a_process_s_own():
    code = "import sys; sys.path.insert(0, 'benchmarks'); import measure as m; b = m.resident(); x = bytearray(b'1' * 200 * 2**20); del x; print(m.resident('VmHWM') - b)"
    assert float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout) == pytest.approx(400, rel=.1)


def test_the_committed_results():
    found = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    assert {"environment", "rows"} <= found.keys() and all(KEYS <= r.keys() for r in found["rows"])
    cases = [(r["work"], r["baseline"], r["method"], r["mean_answer_tokens"]) for r in found["rows"] if r["records_per_safe_image"] == 1]
    for method in ("gd+pd", "kl+pd", "po+pd"):
        assert {("train", b, method, n) for b in ("published", "unpacked") for n in (30, 100, 250)} <= set(cases)
    assert all(r["ratio_min"] <= r["ratio"] <= r["ratio_max"] for r in found["rows"] + found["growth"] + found["levers"])


def test_the_committed_results_of_ranks():
    found = json.loads((ROOT / "benchmarks/results/ranks.json").read_text())
    cases = {(r["engine"], r["tuning"], r["packing"]) for r in found["rows"]}
    assert cases == {(e, t, p) for e in ("ddp", "fsdp2", "zero2", "zero3") for t in ("lora", "sine", "full") for p in ("off", "split")}
    assert all(r["difference"] < (1e-4 if r["tuning"] == "full" else 1e-5) for r in found["rows"])
    assert all(min(r["passes_a_step"]) > 1 for r in found["rows"] if r["packing"] == "split")
    assert all(k["difference"] == 0 for k in found["kills"] if k["ranks"] == [2, 2]) and {tuple(k["ranks"]) for k in found["kills"]} == {(2, 2), (2, 1)}
