"""Runs on several ranks: gloo, a process each on this machine, forked from one that has done the imports."""
import json
import os
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from command import script

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parent / "configs" / "accelerate"


def zero(stage: int) -> dict:
    "The configuration that is shipped; small enough a bar that ZeRO-3 splits every parameter of a tiny model."
    made = json.loads((CONFIGS / {2: "deepspeed_zero2.json", 3: "zero3.json"}[stage]).read_text())
    made["zero_optimization"] |= {"overlap_comm": False} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    return made


ENGINES = {"ddp": {}, "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2}}, "zero2": {"deepspeed": zero(2)}, "zero3": {"deepspeed": zero(3)}}


def fsdp_on_cpu():
    "accelerate takes FSDP for accelerators only; gloo can do it as well, more slowly."
    from accelerate import state
    from accelerate.utils import DistributedType
    init = state.AcceleratorState.__init__

    def with_fsdp(self, *args, **kwargs):
        init(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is None or self.distributed_type != DistributedType.MULTI_CPU: return
        self.fsdp_plugin, self.distributed_type = plugin, DistributedType.FSDP
        state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.AcceleratorState.__init__ = with_fsdp


def zero_on_cpu():
    "DeepSpeed without the kernel for shared memory, which it would compile for minutes."
    import deepspeed.comm.torch
    deepspeed.comm.torch.build_shm_op = lambda: None


def forget_engine():
    "What accelerate remembers of the last run's engine."
    from accelerate.state import AcceleratorState, GradientState
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def kill_at(rank: int, step: int, number: int):
    "A signal for one rank, while it makes a step."
    from safeeraser.trainer import UnlearnTrainer
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if (args.process_index, state.global_step + 1) == (rank, step): os.kill(os.getpid(), number)
    init = UnlearnTrainer.__init__

    def with_kill(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.add_callback(Kill())
    UnlearnTrainer.__init__ = with_kill


def small_passes(tokens: int) -> list[int]:
    "Packed passes of so many tokens; returns a list that will tell how many passes each step's rows became."
    from safeeraser import packed
    made, passes, collate = [], packed.passes, packed.PackedCollator.__call__

    def counted(self, slots):
        step = collate(self, slots)
        made.append(len(step["passes"]))
        return step
    packed.passes, packed.PackedCollator.__call__ = lambda rows, *_: passes(rows, tokens), counted
    return made


def work(runs: list[dict]):
    "What one rank does: `unlearn` with each of these arguments, one after the other."
    import sys

    from safeeraser.trainer import unlearn
    if any("fsdp" in run for run in runs) or os.environ.get("ACCELERATE_USE_FSDP"): fsdp_on_cpu()
    if any("deepspeed" in run for run in runs): zero_on_cpu()
    passes, made = [], small_passes(PASS_TOKENS)
    for run in runs:
        forget_engine()
        made.clear()
        kill = run.pop("kill", None)
        if kill: kill_at(*kill)
        out = run.pop("out")
        try: unlearn(run.pop("model"), run.pop("data"), out[int(os.environ.get("RANK", 0))] if isinstance(out, list) else out, progress=False, **run)
        except KeyboardInterrupt as e: sys.exit(128 + e.signal)
        passes.append(list(made))
    print(json.dumps({"passes": passes}))


PASS_TOKENS = 80  # of a packed pass: two rows of the tiny model's
UNLEARN = "import json, sys; import two_ranks; two_ranks.work(json.loads(sys.argv[1]))"


def together(code: str, *args, world: int = 2, timeout: float = 900, **env) -> list[subprocess.CompletedProcess]:
    "The same script on `world` ranks, as a launcher would start them; waits for all."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
              "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **env}
    one = lambda rank: script(code, *args, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, timeout=timeout, cwd=HERE)
    with ThreadPoolExecutor(world) as pool: return list(pool.map(one, range(world)))


def unlearn_together(*runs: dict, **how) -> list[subprocess.CompletedProcess]:
    """`safeeraser.trainer.unlearn` with each of these arguments on several ranks.

    Besides: `out` may be a list, a folder a rank; `kill` is [rank, step, signal].
    """
    return together(UNLEARN, json.dumps(runs, default=str), **how)


SMALL = {"method": "gd+pd", "seed": 3, "max_steps": 3, "learning_rate": 1e-2, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.,
         "save_strategy": "no", "warmup_steps": 0, "logging_steps": 1}
TUNINGS = {"lora": {}, "sine": {"projector": "sine"}, "full": {"tuning": "full"}}
PACKINGS = {"off": {"packing": "off"}, "split": {"packing": "split", "group_images": True, "pack_row_tokens": 40}}


def batch(at_once: int, accumulation: int) -> dict:
    return {"per_device_train_batch_size": at_once, "gradient_accumulation_steps": accumulation}


def weights(run: Path) -> dict:
    "What a run has written, by name."
    from safetensors.torch import load_file
    return load_file(next(f for name in ("model", "adapter_model") if (f := Path(run) / f"{name}.safetensors").exists()))


def difference(run: Path, other: Path) -> float:
    "Largest over weights of |a - b| / |b|."
    a, b = weights(run), weights(other)
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).norm() / b[k].norm()) for k in b)
