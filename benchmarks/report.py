"""What the benchmarks' command lines share: where the numbers go, and the machine that they are of."""

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unlearning.common.errors import InputError

if TYPE_CHECKING:
    import torch

JsonOption = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write all numbers to a JSON file; - is stdout.")
]
ThreadsOption = Annotated[int | None, typer.Option(help="Threads of torch.  [default: torch's own number]")]


def check_target(json_to: str | None) -> None:
    """Check before anything is measured that the numbers can be written.

    Raises:
        InputError: they cannot.
    """
    if json_to in (None, "-"):
        return
    path = Path(json_to or "")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--json {json_to}: cannot be written: {error.strerror}; name another file") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"--json {json_to}: cannot be written; name another file")


def write_record(record: dict[str, Any], json_to: str | None) -> None:
    """Write a benchmark's numbers to a file, to stdout for `-`, or nowhere."""
    if json_to == "-":
        from unlearning.common.terminal import write_json

        write_json(record)
    elif json_to is not None:
        from unlearning.common.runs import write_json as write_file

        write_file(Path(json_to), record)


def set_threads(threads: int | None) -> None:
    """Let torch use so many threads, or leave it its own choice.

    Raises:
        InputError: fewer than one.
    """
    if threads is None:
        return
    if threads < 1:
        raise InputError(f"--threads {threads}: at least 1")
    import torch

    torch.set_num_threads(threads)


def describe_machine(device: "torch.device") -> dict[str, Any]:
    """Return the machine's properties that the times depend on."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    packages = ("torch", "transformers", "transformer-lens", "nnsight")
    return {
        "device": device.type,
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": {package: installed(package) for package in packages},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
