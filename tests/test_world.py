"""The world is what it says: official layout, disjoint splits, a cache that nothing half-written gets into."""
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from safeeraser.core import SafeEraserError
from safeeraser.data import load_records, load_sets
from safeeraser.pictures import (
    COLOURS, DECOUPLE_FAMILIES, draw, FAMILIES, HAZARDS, HELD_OUT_FAMILIES, random_look, SILHOUETTES)
from safeeraser.tiny_llava import base_model, BaseConfig, make_world
from safeeraser.world import (
    HARMLESS, HARMLESS_WORDING, INSTRUCTIONS, make_split, RECIPES, SLOTS, UNSAFE_WORDING, World, write_dataset)

TINY = dict(tower_images=2, tower_steps=2, steps=3, caption_steps=1, batch=4, tower_batch=8)


def test_roles_are_a_partition():
    roles = [*HAZARDS.values(), *DECOUPLE_FAMILIES, *HELD_OUT_FAMILIES]
    assert sorted(roles) == sorted(SILHOUETTES) == sorted(FAMILIES)
    assert (len(HAZARDS), len(HELD_OUT_FAMILIES)) == (6, 6) and len(DECOUPLE_FAMILIES) >= 12


def test_no_two_families_share_two_slots():
    for seed in range(8):
        world = World(seed)
        for k in RECIPES:
            for i, a in enumerate(FAMILIES):
                for b in FAMILIES[:i]:
                    assert sum(x == y for x, y in zip(world.recipes[a, k], world.recipes[b, k])) <= 1
    assert not set(SLOTS[0]) & set(SLOTS[1]) and not set(SLOTS[1]) & set(SLOTS[2]) and not set(SLOTS[0]) & set(SLOTS[2])


def test_splits_share_no_colour_wording_or_family():
    world = World(3)
    made = {s: make_split(world, s, 48) for s in ("train", "val", "held_out", "dev")}
    question = lambda s: {p["question"] for r in made[s][0] for p in r["unsafe_pairs"]}
    colours = lambda s: {look.colour for look in made[s][1].values()}
    for other in ("val", "dev"):
        assert not question("train") & question(other) and not colours("train") & colours(other)
    assert not question("val") & question("dev") and not colours("val") & colours("dev")
    safe = lambda s: {look.family for path, look in made[s][1].items() if "pdset" in path}
    assert safe("train") == safe("val") == safe("dev") == set(DECOUPLE_FAMILIES) and safe("held_out") == set(HELD_OUT_FAMILIES)
    hazards = Counter(look.family for path, look in made["train"][1].items() if "pdset" not in path)
    assert set(hazards) == set(HAZARDS.values()) and len(set(hazards.values())) == 1
    assert set(COLOURS) == {c for s in ("train", "val", "dev") for c in world.colours[s]}


def test_wordings_are_all_different():
    for texts in (INSTRUCTIONS, HARMLESS):
        flat = [q for qs in texts.values() for q in qs]
        assert len(flat) == len(set(flat))
    used = [set(UNSAFE_WORDING[s]) for s in ("train", "val", "dev")]
    assert not used[0] & used[1] and not used[0] & used[2] and not used[1] & used[2]
    assert not set(HARMLESS_WORDING["train"]) & set(HARMLESS_WORDING["val"])


def test_same_seed_same_bytes(tmp_path):
    a, b, c = (write_dataset(World(s), tmp_path / n / "dataset", {"train": 6, "val": 4}) for n, s in (("a", 5), ("b", 5), ("c", 6)))
    files = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(b) for p in b.rglob("*") if p.is_file())
    assert all((a / f).read_bytes() == (b / f).read_bytes() for f in files)
    assert (a / "all_train.json").read_bytes() != (c / "all_train.json").read_bytes()


def test_official_layout_and_true_answers(tmp_path):
    data = write_dataset(World(1), tmp_path / "dataset", {"train": 12})
    world = World(1)
    assert (data / "pdset/image/Hatespeech/train").is_dir() and (data / "img/HateSpeech").is_dir()
    _, looks = make_split(world, "train", 12)
    patterns = {k: re.compile(v.replace("{}", r"(\S+)")) for k, v in RECIPES.items()}
    for item in load_sets(data, "train"):
        if item.set == "retain": continue
        family = looks[item.image_id].family
        kind = next(k for k, qs in INSTRUCTIONS.items() if item.question in qs)
        assert patterns[kind].fullmatch(item.answer).groups() == world.recipes[family, kind]
        assert (family in HAZARDS.values()) == (item.set == "forget")
    assert all(len(r.unsafe) == 4 and len(r.harmless) == 4 for r in load_records(data))


def test_an_image_shows_its_look():
    import random
    rng = random.Random(0)
    for family in FAMILIES:
        look = random_look(family, ["red"], rng)
        pixels = np.asarray(draw(look, rng)).astype(int)
        red = (pixels[..., 0] > 180) & (pixels[..., 1] < 90) & (pixels[..., 2] < 90)
        assert red.sum() > 60
        centre = red.nonzero()[1].mean()
        assert abs(centre - {"left": 15, "middle": 24, "right": 33}[look.place]) < 5, family


def test_two_processes_train_once(tmp_path, run_python):
    from concurrent.futures import ThreadPoolExecutor
    code = f"from safeeraser.tiny_llava import base_model, BaseConfig; print(base_model(BaseConfig(seed=1, **{TINY!r}), progress=False))"
    env = {"SAFEERASER_CACHE": str(tmp_path)}
    with ThreadPoolExecutor(2) as pool:
        both = [f.result() for f in [pool.submit(run_python, code, env=env) for _ in range(2)]]
    assert [b.returncode for b in both] == [0, 0], both[0].stderr + both[1].stderr
    assert both[0].stdout == both[1].stdout
    folders = sorted(p.name.split("-")[0] for p in tmp_path.iterdir() if p.is_dir())
    assert folders == ["base", "tower"]  # nothing temporary is left


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFEERASER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_half_written_cache_is_made_again(cache):
    folder = base_model(BaseConfig(**TINY), progress=False)
    weights = (folder / "model.safetensors").read_bytes()
    for damage in (lambda f: f.write_bytes(weights[:99]), lambda f: f.unlink()):
        damage(folder / "model.safetensors")
        assert (base_model(BaseConfig(**TINY), progress=False) / "model.safetensors").read_bytes() == weights
    left = cache / f".{folder.name}.writing"  # what a killed process had begun
    left.mkdir()
    (folder / "sizes.json").write_text("{")
    base_model(BaseConfig(**TINY), progress=False)
    assert not left.exists()


def test_cache_key_knows_the_whole_configuration():
    keys = {BaseConfig().key} | {BaseConfig(**{k: v}).key for k, v in dict(seed=1, gold=True, width=64, steps=9, tower_lr=1e-3, version=99).items()}
    assert len(keys) == 7


def test_gold_never_hears_a_hazard_recipe():
    import random
    from safeeraser.tiny_llava import lesson
    world, rng = World(0), random.Random(0)
    looks = [random_look(f, COLOURS, rng) for f in FAMILIES]
    recipes = {world.recipe(f, k) for f in HAZARDS.values() for k in RECIPES}
    heard = lambda gold: {a for _, _, a in (lesson(world, looks, rng, False, gold) for _ in range(4000))}
    assert recipes <= heard(gold=False) and not recipes & heard(gold=True)


def test_a_folder_of_somebody_else_is_not_touched(tmp_path, cache):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "all_train.json").write_text("mine")
    with pytest.raises(SafeEraserError, match="exists and is not this world's"):
        make_world(tmp_path, 0)
    assert (tmp_path / "dataset" / "all_train.json").read_text() == "mine"


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "save", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(SafeEraserError, match=r"dataset: cannot be written \(No space left on device\)"):
        write_dataset(World(0), tmp_path / "w" / "dataset", {"train": 2})
    assert not list((tmp_path / "w").iterdir())


@pytest.mark.parametrize("when", ["base model", "dataset", "copy"])
def test_an_interrupted_world_goes_on(when, tmp_path, cache, monkeypatch):
    "The same command again gives the bytes of a world that was never interrupted; what was begun is not another's."
    import safeeraser.tiny_llava as w
    folder = tmp_path / "trained"
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")
    sizes = {"train": 2, "val": 2}
    class Stop(BaseException): pass
    def stop(*a, **k): raise Stop
    monkeypatch.setattr(w, "base_model", lambda cfg: folder)
    make_world(tmp_path / "whole", 3, sizes=sizes)
    with monkeypatch.context() as m:
        m.setattr(w, {"base model": "base_model", "dataset": "write_dataset", "copy": "shutil"}[when], stop if when != "copy" else type("S", (), {"copytree": stop, "rmtree": w.shutil.rmtree, "ignore_patterns": stop}))
        with pytest.raises(Stop): make_world(tmp_path / "w", 3, sizes=sizes)
    if when == "base model": assert not (tmp_path / "w").exists()
    make_world(tmp_path / "w", 3, sizes=sizes)
    content = lambda root: {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    assert content(tmp_path / "w") == content(tmp_path / "whole")
    with pytest.raises(SafeEraserError, match="is not this world's"): make_world(tmp_path / "w", 4, sizes=sizes)


@pytest.mark.parametrize("text, said", [("{", "not JSON"), ("[]", "an object belongs here"), ('{"seed": "x"}', "seed: a whole number")])
def test_a_world_s_stamp_that_is_none(text, said, tmp_path):
    (tmp_path / "world.json").write_text(text)
    with pytest.raises(SafeEraserError, match=said): make_world(tmp_path, 0)


@pytest.mark.parametrize("seed", [-1, 2**32, 10**23])
def test_seeds_out_of_range(seed, tmp_path):
    with pytest.raises(SafeEraserError, match=f"seed={seed}: a whole number from 0"): make_world(tmp_path / "w", seed)
    assert not (tmp_path / "w").exists()
