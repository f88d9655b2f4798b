"""The loops that are compared: the published one's cost in our words, one row a question, and this package's.

Each makes the batches it needs first (reading images and tokenizing is charged to nobody) and returns a function that does
one step's forward and backward passes by the loop's own attention; caches start empty in every call, so filling them is charged.
"""
import copy
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from safeeraser.cache import ReferenceCache, VisionCache
from safeeraser.encoder import count_items, Encoder, number_items
from safeeraser.slots import KINDS, Row
from safeeraser.engine import Engine
from safeeraser.generate import answer_batch
from safeeraser.loss import Objective
from safeeraser.packed import PackedCollator, set_attention, to_device, use_route
from safeeraser.packing import GPU_PASS_TOKENS, Packer, PASS_TOKENS
from safeeraser.predict import batch_tokens, placed

Step = Callable[[], float]  # one step; returns its loss


def precision(model):
    "Autocast to the model's own precision, as the trainer does: its adapters are float32."
    base, device = model.get_base_model(), next(model.parameters()).device.type
    return torch.autocast(device, base.dtype) if base.dtype != torch.float32 else nullcontext()


def published(model,                        # a PEFT model
              encoder: Encoder, objective: Objective, records: list,
              vanilla_model=None            # a second copy for KL; None: made where it is needed
              ) -> Step:
    """Three passes an item (forget, retain, decouple), one backward for them, logits of all words at all positions, the image
    seen anew in every pass; KL over all positions against a second model."""
    device = next(model.parameters()).device
    reference = (vanilla_model or pristine(model)) if objective.reference_kinds else None
    items = [[to_device(encoder.rows([row]), device) for row in rows] for r in records for rows in zip(*(getattr(r, k) for k in objective.kinds))]
    weights = {term.rows[0]: (objective.weights[name] * (-1 if name == "ga" else 1), term.needs.distribution) for name, term in objective.terms.items()}
    def step() -> float:
        set_attention(model, "sdpa")
        model.zero_grad(set_to_none=True)
        total = 0.0
        with precision(model):
            for batches in items:
                loss = 0.0
                for kind, batch in zip(objective.kinds, batches):
                    weight, whole = weights[kind]
                    loss = loss + weight * (_full_kl(model, reference, batch) if whole else _full_ce(model, batch))
                (loss / len(items)).backward()
                total += loss.item() / len(items)
        return total
    return step


def pristine(model):
    "A second copy of the model as it was."
    with model.disable_adapter(): plain = copy.deepcopy(model.get_base_model())
    return plain.requires_grad_(False)


def _full_logits(model, batch: dict) -> torch.Tensor:
    return model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits.float()


def _full_ce(model, batch: dict) -> torch.Tensor:
    return F.cross_entropy(_full_logits(model, batch)[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)


def _full_kl(model, reference, batch: dict) -> torch.Tensor:
    with torch.no_grad(): before = F.log_softmax(_full_logits(reference, batch), -1)
    return F.kl_div(F.log_softmax(_full_logits(model, batch), -1), before, log_target=True, reduction="none").sum(-1).mean()


def unpacked(model, encoder: Encoder, objective: Objective, records: list, keep_images: bool = True) -> Step:
    "A row a question; else as this package does it: logits at labels, the image seen once, the adapter off for a reference."
    device, rows = next(model.parameters()).device, _rows(objective, records)
    asked = lambda row: objective.reference_kinds if row.kind in objective.reference_kinds else ()
    plain = [to_device(placed(_plain_batch(encoder, row), asked(row)), device) for row in rows]
    counts = dict(zip(KINDS, count_items(rows).tolist()))
    return _steps(model, objective, plain, counts, None, keep_images)


def packed(model, encoder: Encoder, objective: Objective, records: list, route: str = "split", later_epoch: bool = False) -> Step:
    "This package's way; in a later epoch what the vanilla model said is known."
    device = next(model.parameters()).device
    tokens = GPU_PASS_TOKENS if device.type == "cuda" else PASS_TOKENS
    batch = to_device(PackedCollator(Packer(encoder), objective.reference_kinds, tokens=tokens)([_rows(objective, records)]), device)
    kept = ReferenceCache(model, 2**32) if later_epoch else None
    step = _steps(model, objective, batch["passes"], dict(zip(KINDS, batch["n_items"].tolist())), route, True, kept)
    if later_epoch: step()
    return step


def _rows(objective: Objective, records: list) -> list[Row]: return [row for r in records for row in r.rows(objective)]


def _plain_batch(encoder: Encoder, row: Row) -> dict:
    return encoder.rows([row]) | {"kind": torch.tensor([KINDS.index(row.kind)]), "item": torch.tensor(number_items([row])), "n_items": count_items([row])}


def _steps(model, objective: Objective, batches: list[dict], counts: dict, route: str | None, keep_images: bool, kept=None) -> Step:
    parts = [_about(objective, batch) for batch in batches]
    def step() -> float:
        use_route(model, route or "dense")  # without packed rows dense is the model's plain attention
        model.zero_grad(set_to_none=True)
        total = 0.0
        with VisionCache(model) if keep_images else nullcontext(), precision(model):
            for batch, part in zip(batches, parts):
                loss, _ = part(batch_tokens(model, batch, part, route, kept), counts)
                loss.backward()
                total += loss.item()
        return total
    return step


def _about(objective: Objective, batch: dict) -> Objective:
    "The terms that read the rows of a batch: no reference is asked for rows that need none."
    kinds = {KINDS[k] for k in batch["kind"].unique().tolist() if k >= 0}
    return Objective({name: term for name, term in objective.terms.items() if set(term.rows) <= kinds}, objective.weights)


def generate_published(model, encoder: Encoder, items: list, new_tokens: int) -> list[str]:
    "One answer at a time, by the model's own `generate`."
    set_attention(model, "sdpa")
    return [text for item in items for text in answer_batch(model, encoder, [item], new_tokens)]


def generate_shared(model, encoder: Encoder, items: list, new_tokens: int) -> list[str]:
    "This package's way: all questions about all images at once."
    return Engine(model, encoder).answer(items, new_tokens)
