"""One of two processes: trains the same runs as the test does alone, under DDP and under FSDP.

    python -m tests.unlearning.distributed_worker DIRECTORY

accelerate shards models on accelerators only; `shard_on_cpu` lets its very code do so here.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import accelerate.state
from accelerate.utils import DistributedType

# Not `kl` for BLUR: its gradient is zero at the start, and the rounding that is left of it, of which Adam makes a whole
# step, differs between machines and numbers of processes.
RUNS: dict[str, dict[str, Any]] = {
    "npo": {"method": "npo", "batch_size": 2, "gradient_accumulation_steps": 1},
    "blur": {"method": "blur", "batch_size": 1, "gradient_accumulation_steps": 2, "gamma": 1.0, "retain_loss": "nll"},
    "sam_npo": {"method": "sam_npo", "batch_size": 1, "gradient_accumulation_steps": 2, "rho": 0.1},
    "noise": {"method": "sam_npo", "batch_size": 2, "gradient_accumulation_steps": 1, "smoothing": "noise"},
    "sure": {"method": "sure", "batch_size": 2, "gradient_accumulation_steps": 1},
    "circuit_breakers": {"method": "circuit_breakers", "batch_size": 2, "gradient_accumulation_steps": 1},
    "undo": {"method": "undo", "batch_size": 2, "gradient_accumulation_steps": 1},
    "layered": {"method": "layered", "batch_size": 1, "gradient_accumulation_steps": 2, "folds": 2},
    "oracle": {"method": "oracle", "batch_size": 2, "gradient_accumulation_steps": 1, "control": "DIRECTORY/control"},
    "ilu": {"method": "ilu", "batch_size": 2, "gradient_accumulation_steps": 1, "invariance": 3.0},
    "elm": {"method": "elm", "batch_size": 2, "gradient_accumulation_steps": 1, "concept": "towns", "eta": 3.0}
    | {"novice": "None of {concept}:", "expert": "All of {concept}:"},
    "lat": {"method": "lat", "batch_size": 2, "gradient_accumulation_steps": 1, "attack_steps": 2},
    "mudman": {"method": "mudman", "batch_size": 1, "gradient_accumulation_steps": 2, "save_every": 2}
    | {"adversary_learning_rate": 0.1, "trained_maps": "inputs"},
    "tar": {"method": "tar", "batch_size": 2, "gradient_accumulation_steps": 1, "forget_loss": "npo"},
}
QUANTIZED: dict[str, dict[str, Any]] = {
    f"{bits} bit": {
        "method": "npo",
        "lora_rank": 2,
        "base_bits": bits,
        "batch_size": 2,
        "gradient_accumulation_steps": 1,
    }
    for bits in (4, 8)
}
"""Runs of an adapter on a quantized base, which FSDP does not shard."""
SHARED: dict[str, Any] = {"max_steps": 3, "learning_rate": 1e-3, "weight_decay": 0, "logging_steps": 1}
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def run_in(run: dict[str, Any], directory: Path) -> dict[str, Any]:
    """A run with its paths."""
    there = {name: value for name, value in run.items() if isinstance(value, str)}
    return run | {name: value.replace("DIRECTORY", str(directory)) for name, value in there.items()}


def shard_on_cpu() -> None:
    """Treat processes on CPUs as accelerate treats those on GPUs when FSDP is asked for."""
    plain = accelerate.state.AcceleratorState.__init__

    def sharding(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate.state.AcceleratorState.__init__ = sharding


def interrupted_after(steps: int, settings: dict[str, Any]) -> None:
    """Train that many steps; what comes next goes on from their checkpoint."""
    import unlearning
    from unlearning.training.trainer import UnlearningTrainer

    whole = UnlearningTrainer.training_step

    def cut(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == steps:
            raise KeyboardInterrupt
        return whole(self, *args, **kwargs)

    UnlearningTrainer.training_step = cut  # type: ignore[method-assign]
    try:
        unlearning.train(**settings)
    except KeyboardInterrupt:
        pass
    finally:
        UnlearningTrainer.training_step = whole  # type: ignore[method-assign]


def main(directory: Path) -> None:
    """Train every run twice and save it."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    import unlearning
    from unlearning.training.trainer import UnlearningTrainer

    wrappers: set[str] = set()
    backward = UnlearningTrainer._backward

    def watched(self: Any, model: Any, *args: Any) -> float:
        kinds = {"ddp": DistributedDataParallel, "fsdp": FSDPModule}
        wrappers.update(name for name, kind in kinds.items() if isinstance(model, kind))
        return backward(self, model, *args)

    UnlearningTrainer._backward = watched  # type: ignore[method-assign]
    shard_on_cpu()
    for wrapper in ("ddp", "fsdp"):
        if wrapper == "fsdp":
            os.environ.update(FSDP)
        for name, run in (RUNS | QUANTIZED if wrapper == "ddp" else RUNS).items():
            wrappers.clear()
            settings: dict[str, Any] = {
                "model": directory / "model",
                "forget": directory / "forget.json",
                "retain": directory / "retain.json",
                "output_dir": directory / f"{name}-{wrapper}",
                "progress": False,
                **run_in(run, directory),
                **SHARED,
            }
            if "save_every" in run:
                interrupted_after(run["save_every"], settings)
            unlearning.train(**settings, resume="save_every" in run)
            assert wrappers == {wrapper}, wrappers
    if os.environ["RANK"] == "0":
        (directory / "done.json").write_text(json.dumps(list(RUNS)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
