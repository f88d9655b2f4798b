"""Counts where Python waits for a GPU, on a machine that has none.

Tensors that would be on the GPU carry a mark, and all that is made of them. Marked tensors say that they are on `cpu:0`,
so what is moved or made there is marked too. Counted is what makes Python wait for marked tensors, or copies to them.
"""
from collections import Counter

import torch
from torch.overrides import TorchFunctionMode

THERE, HERE = torch.device("cpu", 0), torch.device("cpu")
ASKS = {"tolist", "item", "cpu", "numpy", "nonzero", "masked_select", "unique", "equal", "allclose", "__bool__", "__int__", "__float__", "__index__", "__contains__"}


def tensors(value):
    "All tensors in nested arguments."
    if isinstance(value, torch.Tensor): yield value
    elif isinstance(value, (list, tuple)): yield from (t for v in value for t in tensors(v))
    elif isinstance(value, dict): yield from tensors([*value.values()])


def there(value) -> bool: return any(getattr(t, "_there", False) for t in tensors(value))


class Waits(TorchFunctionMode):
    "`with Waits(model) as waits:` counts them in `waits.found`, by the name of what waits."
    def __init__(self, model):
        super().__init__()
        self.found = Counter()
        for t in (*model.parameters(), *model.buffers()): t._there = True

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", str(function))
        from_there = there((args, kwargs))
        if name == "__get__" and isinstance(made := function(*args, **kwargs), torch.device): return THERE if from_there else HERE
        said = next((d for d in (*args, *kwargs.values()) if isinstance(d, torch.device)), None)
        to_there = said == THERE if said is not None else from_there and name not in ("cpu", "tolist", "item")
        if self.waits(name, args, from_there, to_there): self.found[name] += 1
        made = function(*args, **kwargs)
        if name in ("to", "cpu") and from_there != to_there: made = made.detach()  # here both are one object
        for t in tensors(made): t._there = to_there
        return made

    def waits(self, name: str, args: tuple, from_there: bool, to_there: bool) -> bool:
        if name in ASKS: return from_there
        if name in ("to", "tensor", "as_tensor"): return from_there != to_there
        if name in ("__getitem__", "__setitem__", "index_select", "index"):  # a mask, or places that are not there yet
            places = [p for p in (args[1] if isinstance(args[1], tuple) else args[1:2])]
            return from_there and any(isinstance(p, list) or isinstance(p, torch.Tensor) and (p.dtype == torch.bool or not there(p)) for p in places)
        return False
