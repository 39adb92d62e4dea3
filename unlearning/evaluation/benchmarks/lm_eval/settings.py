"""Settings of lm-evaluation-harness' tasks."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from unlearning.data.named import data_directory
from unlearning.evaluation.benchmarks.lm_eval.tasks import check_installed
from unlearning.evaluation.harness import Benchmark, Prepare
from unlearning.evaluation.settings import Names, names_of
from unlearning.evaluation.subject import Runtime, Subject

TASKS = ("mmlu", "winogrande", "hellaswag", "arc_challenge", "arc_easy", "boolq", "piqa", "openbookqa")


@dataclass(frozen=True, kw_only=True)
class LmEvalSettings:
    """MMLU, WinoGrande, HellaSwag, ARC, BoolQ, PIQA, OpenBookQA and every other task of lm-evaluation-harness.

    Attributes:
        tasks: Tasks, groups or tags of lm-evaluation-harness.
        tasks_dir: Directory of additional tasks (.yaml).
        num_fewshot: Number of solved examples shown; None for each task's own.
        chat: Wrap prompts by the tokenizer's chat template.
        data_dir: Directory that holds the tasks' data sets; None for $DISSECT_DATA, then the hub.
        limit: Use only the first N rows of each task.
        seed: Random seed of the solved examples and of the bootstrap.
    """

    source: ClassVar[str] = "https://github.com/EleutherAI/lm-evaluation-harness"

    tasks: Names = TASKS
    tasks_dir: str | Path | None = None
    num_fewshot: int | None = None
    chat: bool = False
    data_dir: str | Path | None = None
    limit: int | None = None
    seed: int = 0

    def open(self, runtime: Runtime) -> Prepare:
        """Check the tasks' names; see `Settings.open`."""
        check_installed()
        from unlearning.evaluation.benchmarks.lm_eval import benchmark

        names, directory = names_of(self.tasks), data_directory(self.data_dir)
        tasks_dir = None if self.tasks_dir is None else Path(self.tasks_dir)
        benchmark.check_tasks(names, tasks_dir)
        tasks = benchmark.Tasks(tuple(names), tasks_dir, directory, self.num_fewshot, self.limit)

        def prepare(subject: Subject) -> Benchmark:
            return benchmark.prepare(subject, tasks, chat=self.chat, seed=self.seed, batch_size=runtime.batch_size)

        return prepare
