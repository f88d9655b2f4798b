"""Runs on several ranks: gloo, a process each on this machine, forked from one that has done the imports."""
import json
import os
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor

from command import script

# Small enough for CPUs; ZeRO-3 splits every parameter, where its default would leave small ones whole on each rank.
ZERO = {stage: {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
                "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "bf16": {"enabled": "auto"},
                "zero_optimization": {"stage": stage, "overlap_comm": False, "stage3_param_persistence_threshold": 0}} for stage in (2, 3)}
ENGINES = {"ddp": {}, "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}},
           "zero2": {"deepspeed": ZERO[2]}, "zero3": {"deepspeed": ZERO[3]}}


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


def together(code: str, *args, world: int = 2, timeout: float = 120, **env) -> list[subprocess.CompletedProcess]:
    "The same script on `world` ranks, as a launcher would start them; waits for all."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
              "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **env}
    one = lambda rank: script(code, *args, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, timeout=timeout,
                              cwd=os.path.dirname(os.path.abspath(__file__)))
    with ThreadPoolExecutor(world) as pool: return list(pool.map(one, range(world)))


UNLEARN = """
import functools, json, sys
from safeeraser import packed
from ranks import forget_engine, fsdp_on_cpu, zero_on_cpu
from safeeraser.trainer import unlearn
if "fsdp" in sys.argv[1]: fsdp_on_cpu()
if "deepspeed" in sys.argv[1]: zero_on_cpu()
passes = packed.passes
for run in json.loads(sys.argv[1]):
    forget_engine()
    packed.passes = functools.partial(passes, tokens=run.pop("pass_tokens", 1024))
    unlearn(run.pop("model"), run.pop("data"), run.pop("out"), progress=False, **run)
"""


def unlearn_together(*runs: dict, world: int = 2, timeout: float = 120, **env) -> list[subprocess.CompletedProcess]:
    "`safeeraser.trainer.unlearn` with each of these arguments, one after the other, on `world` ranks; `pass_tokens`: of a packed pass."
    return together(UNLEARN, json.dumps(runs, default=str), world=world, timeout=timeout, **env)
