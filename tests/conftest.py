"""Small fixtures: an untrained tiny LLaVA and a small dataset folder; no base model is trained for these."""
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def make_tiny(root: Path) -> SimpleNamespace:
    """`model` and `data` folders; 11 forget items, so that batches of 4 and 8 leave a
    remainder, and 6 retain items, so that some slots have none."""
    import json

    from safeeraser.tiny_llava import BaseConfig, build_model
    from safeeraser.world import World, write_dataset
    root.mkdir(exist_ok=True)
    model, processor = build_model(BaseConfig(width=32, vision_width=32))
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    data = write_dataset(World(0), root / "world" / "dataset", {"train": 3, "val": 3, "held_out": 2})
    file = data / "all_train.json"
    records = json.loads(file.read_text())
    records[0]["unsafe_pairs"].pop()
    for record in records[1:]:
        for key in ("UnharmPair_text2", "UnharmPair_image1", "UnharmPair_image2"): del record[key]
    file.write_text(json.dumps(records))
    (data / "settings.json").write_text(json.dumps({"generate": {"max_new_tokens": 6, "batch_size": 8}}))
    return SimpleNamespace(root=root, model=root / "model", data=data)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory): return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run_python():
    "Run a script's text in a process of its own, or a script's file by a launcher; returns the finished process."
    import subprocess
    import sys

    from command import script

    def run(code: str, *args, env=None, launcher=()):
        if not launcher: return script(code, *args, env=env, cwd=Path(__file__).parent)
        return subprocess.run([sys.executable, *launcher, code, *map(str, args)], capture_output=True, text=True, timeout=300,
                              env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}, cwd=Path(__file__).parent)
    return run


@pytest.fixture(scope="module")
def sharp(tiny):
    "The tiny model with larger weights, so that random answers differ from question to question; and its encoder."
    import torch

    from safeeraser.encoder import Encoder
    from safeeraser.model import load_model
    model, processor = load_model(tiny.model, "cpu")
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.2 * torch.randn(p.shape, generator=g))
    return model, Encoder(processor)
