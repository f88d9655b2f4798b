"""What a pass asks of a GPU, counted without one: writes benchmarks/gpu_counts.json.

    python benchmarks/counts.py --as after          (a minute; `before` was written by the code of commit 8a3a3f9)

LLaVA-1.5-7B's shapes on the meta device, bfloat16 with LoRA r 32, one training pass forward and backward by the code path
that a GPU takes. A kernel is an aten operation that isn't a view and makes no empty tensor; a synchronisation is one whose
result the host must wait for (`item`, `nonzero`, a boolean mask as an index, a copy between host and device). Integer tensors
keep their values beside the meta tensor, so that code which asks for them goes on. Peak: bytes alive at once above the weights.
"""
import argparse, json
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from weakref import ref

import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from safeeraser.core import write_whole
from safeeraser.loss import parse_objective
from safeeraser.model import add_adapter
from safeeraser.packed import to_device, unwrapped, use_route, Verdict
from safeeraser.packing import GPU_PASS_TOKENS, PackedRow, passes, stack_rows
from safeeraser.trainer import Tally, UnlearnTrainer
from shape import build_model, SHAPES, WORDS

OUT = Path(__file__).parent/"gpu_counts.json"
METHODS, WORDS_7B = ("gd+pd", "kl+pd", "po+pd"), 32064
aten = torch.ops.aten
FREE = {aten.detach.default, aten.alias.default, aten._unsafe_view.default, aten.lift_fresh.default, aten.empty_like.default,
        aten.empty.memory_format, aten.empty_strided.default, aten.new_empty.default, aten.new_empty_strided.default}
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default,
         aten.equal.default, aten.is_nonzero.default}
MOVES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


def tensors(x) -> list[torch.Tensor]: return [t for t in tree_leaves(x) if isinstance(t, torch.Tensor)]


class Device(TorchDispatchMode):
    "Counts what tensors on the meta device ask for, and the bytes that are alive."
    def __init__(self):
        super().__init__()
        self.values, self.kept, self.live = WeakTensorKeyDictionary(), {}, 0
        self.start()

    def start(self):
        self.kernels, self.waits = Counter(), Counter()
        self.peak = self.before = self.live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tensors((args, kwargs))
        if not any(t.is_meta for t in given) and kwargs.get("device") != torch.device("meta"): return func(*args, **kwargs)
        if func in INDEXED and any(t.dtype == torch.bool for t in tensors(args[1])): args = self.without_masks(func, args)
        to_host = func in MOVES and given[0].is_meta and kwargs.get("device") == torch.device("cpu")
        if to_host: out = func(self.values[given[0]], **kwargs)
        else: out = self.known(func, args, kwargs) if func in WAITS else func(*args, **kwargs)
        self.count(func, given, tensors(out))
        self.remember(func, given, args, kwargs, out)
        for t in given: self.weigh(t, 0)  # weights: they were there before
        for t in tensors(out): self.weigh(t, t.untyped_storage().nbytes())
        return out

    @property
    def above(self) -> int:
        "Bytes alive at the highest, above what was there at the start."
        return self.peak - self.before

    def without_masks(self, func, args) -> tuple:
        "The arguments with the places where a mask is true: the host must know how many they are."
        self.waits[str(func) + " by a mask"] += 1
        places = lambda t: [self.on_device(i) for i in self.values[t].nonzero(as_tuple=True)] if t.dtype == torch.bool else [t]
        return args[0], [i for t in args[1] for i in (places(t) if t is not None else [None])], *args[2:]

    def known(self, func, args, kwargs):
        "What the operation gives, by the values that the host would wait for."
        out = func(*tree_map_only(torch.Tensor, self.values.__getitem__, args), **kwargs)
        return tree_map_only(torch.Tensor, self.on_device, out)

    def on_device(self, value: torch.Tensor) -> torch.Tensor:
        made = torch.empty_like(value, device="meta")
        self.values[made] = value
        return made

    def count(self, func, given, out):
        moved = func in MOVES and len({t.device for t in (*given, *out)}) > 1
        if func in WAITS or moved: self.waits[str(func)] += 1
        if not (func.is_view or func in FREE or func in WAITS or moved): self.kernels[str(func)] += 1

    def remember(self, func, given, args, kwargs, out):
        "The values of an integer result whose inputs are known."
        whole = [t for t in tensors(out) if t.is_meta and not t.is_floating_point() and t not in self.values]
        value = lambda t: self.values[t] if t.is_meta else t
        if not whole or not all(not t.is_meta or t in self.values for t in given): return
        host = {k: torch.device("cpu") if k == "device" else v for k, v in kwargs.items()}
        found = func(*tree_map_only(torch.Tensor, value, args), **tree_map_only(torch.Tensor, value, host))
        for t, v in zip(tensors(out), tensors(found)): self.values[t] = v

    def weigh(self, t: torch.Tensor, size: int):
        "Count a new storage's bytes until it is gone."
        storage = t.untyped_storage()
        if not t.is_meta or (key := storage._cdata) in self.kept: return
        def gone(_, key=key, size=size):
            del self.kept[key]
            self.live -= size
        self.kept[key], self.live = ref(storage, gone), self.live + size
        self.peak = max(self.peak, self.live)


class LikeCuda(TorchFunctionMode):
    "What the meta device lacks: autocast to bfloat16, one kernel for an attention without a mask, one for dropout."
    CAST = {F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm, F.conv2d}

    def __init__(self):
        super().__init__()
        self.weights = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.CAST: args, kwargs = tree_map_only(torch.Tensor, self.cast, (args, kwargs))
        if func is F.dropout and kwargs.get("training", True): return torch.native_dropout(args[0], kwargs.get("p", .5), True)[0]
        if func is F.scaled_dot_product_attention and kwargs.get("attn_mask") is None:
            return aten._scaled_dot_product_flash_attention(*args[:3], 0.0, kwargs.get("is_causal", False), scale=kwargs.get("scale"))[0]
        return func(*args, **kwargs)

    def cast(self, x: torch.Tensor) -> torch.Tensor:
        "Weights once a pass, as autocast keeps them."
        if not x.is_meta or x.dtype != torch.float32: return x
        if not isinstance(x, torch.nn.Parameter): return x.to(torch.bfloat16)
        if id(x) not in self.weights: self.weights[id(x)] = x.to(torch.bfloat16)
        return self.weights[id(x)]


def row(kinds: list[str], tokens: int, answer: int = 180, name: str = "image", first: int = 0) -> PackedRow:
    "A row of one image whose segments fill it, an item each, numbered from `first`."
    prefix = 22 + 576
    own = (tokens - prefix) // len(kinds)
    ids = [1] * 21 + [WORDS.index("<image>")] * 576 + [7] + [9] * own * len(kinds)
    labels = ([-100] * (own - answer - 1) + [9] * answer + [-100]) * len(kinds)
    return PackedRow(name, ids, [prefix, *[own] * len(kinds)], [-100] * prefix + labels, kinds, list(range(first, first + len(kinds))),
                     {"pixel_values": torch.zeros(1, 3, 336, 336)})


def one_pass(model, batch: dict, method: str, checkpointing: bool = False) -> Device:
    "The counts of a pass of a trainer, as if on a GPU."
    objective, device = parse_objective(method), Device()
    trainer = SimpleNamespace(objective=objective, packing=Verdict("split", ""), reference=None, tally=Tally(),
                              state=SimpleNamespace(global_step=0), accelerator=SimpleNamespace(autocast=nullcontext), args=SimpleNamespace(world_size=1))
    trainer.pass_loss = lambda *args: UnlearnTrainer.pass_loss(trainer, *args)
    again = lambda: (nullcontext(), LikeCuda())  # a layer that is computed again
    if checkpointing: model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": again})
    else: model.gradient_checkpointing_disable()
    use_route(model, "split")
    model.train().zero_grad(set_to_none=True)
    with device:
        batch = to_device(batch, torch.device("meta"))
        trainer.tally.begin_step(torch.device("meta"))
        device.moved = sum(device.waits.values())
        device.start()
        with LikeCuda(): loss = UnlearnTrainer.compute_loss(trainer, model, batch, num_items_in_batch=batch["n_items"])
        loss.backward()
    return device


def adapted(words: int, layers: int):
    "The 7B with another vocabulary and fewer layers, and its adapter."
    shape = SHAPES["7b"]
    cut = replace(shape, words=words, text=shape.text | {"num_hidden_layers": layers})
    model = add_adapter(build_model(cut, torch.bfloat16, "meta"), 32, 256, .05)
    unwrapped(model)._head_says_all = True  # nothing is done to LLaVA's scores
    model.forward = convert_outputs_to_fp32(model.forward)  # as accelerate does in 16 bits
    return model


def long_row(method: str) -> dict:
    "A batch of one row: 3,072 tokens in 12 segments."
    objective = parse_objective(method)
    return stack_rows([row([objective.kinds[n % len(objective.kinds)] for n in range(12)], 3072)], objective.reference_kinds)


def usual_rows(method: str) -> list[dict]:
    "The passes of eight rows, each of 1,100 tokens in 8 segments."
    objective = parse_objective(method)
    kinds = [objective.kinds[n % len(objective.kinds)] for n in range(8)]
    rows = [row(kinds, 1100, answer=40, name=f"image {n}", first=8 * n) for n in range(8)]
    return [stack_rows(together, objective.reference_kinds) for together in passes(rows, GPU_PASS_TOKENS)]


def counted(batches: list[dict], method: str) -> dict:
    "Kernels and synchronisations of passes: of one and of two layers, the other thirty being like the second."
    one, two = ([one_pass(adapted(WORDS_7B, layers), batch, method) for batch in batches] for layers in (1, 2))
    kernels = [sum(sum(d.kernels.values()) for d in runs) for runs in (one, two)]
    return {"passes": len(batches), "kernels": kernels[1] + 30 * (kernels[1] - kernels[0]), "kernels_a_layer": kernels[1] - kernels[0],
            "synchronisations": sum(sum(d.waits.values()) for d in two), "tensors_to_device": sum(d.moved for d in two)}


def peaks(method: str) -> dict:
    "GiB above the weights at the long row's highest, at a vocabulary of 152k."
    model = adapted(152_000, 32)
    return {name: round(one_pass(model, long_row(method), method, on).above / 2**30, 2)
            for name, on in (("peak_gib", False), ("peak_gib_checkpointed", True))}


def versions() -> dict:
    "Of what decides how many kernels a layer asks for."
    return {package: version(package) for package in ("torch", "transformers", "peft")}


def main(name: str):
    "Write what the code that is here asks for under `before` or `after`."
    found = json.loads(OUT.read_text()) if OUT.exists() else {"how": " ".join(__doc__.split("\n\n")[-1].split())}
    found["versions"] = versions()
    found[name] = {m: {"long_row": counted([long_row(m)], m) | peaks(m), "eight_usual_rows": counted(usual_rows(m), m)} for m in METHODS}
    write_whole(OUT, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--as", dest="name", default="after", choices=["before", "after"])
    main(parser.parse_args().name)
