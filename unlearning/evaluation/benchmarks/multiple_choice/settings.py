"""Settings of WMDP and of any other multiple-choice questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from unlearning.common.errors import InputError, naming
from unlearning.common.places import is_there
from unlearning.data.choice_questions import Question, read_questions
from unlearning.evaluation.benchmarks.multiple_choice import benchmark
from unlearning.evaluation.benchmarks.multiple_choice.benchmark import SCORINGS, Asking
from unlearning.evaluation.harness import Prepare
from unlearning.evaluation.settings import Names, given, names_of
from unlearning.evaluation.subject import Runtime


@dataclass(frozen=True, kw_only=True)
class WmdpSettings:
    """Biology, chemistry and cybersecurity questions, zero-shot; chance is 0.25.

    Attributes:
        sets: Question sets, of bio, chem and cyber.
        scoring: Scorings, of letter (options listed, letters scored), answer (listed, texts scored) and cloze (not
            listed, texts scored).
        permute: Ask every question again in N other orders of its options.
        chat: Wrap prompts by the tokenizer's chat template.
        data_dir: Directory that holds wmdp/; None for $DISSECT_DATA, then the hub.
        limit: Use only the first N questions of each set.
        seed: Random seed of the orders and of the bootstrap.
    """

    source: ClassVar[str] = "WMDP, arXiv 2403.03218"

    sets: Names = ("bio", "chem", "cyber")
    scoring: Names = SCORINGS
    permute: int = 0
    chat: bool = False
    data_dir: str | Path | None = None
    limit: int | None = None
    seed: int = 0

    def open(self, _runtime: Runtime) -> Prepare:
        """Read the questions; see `Settings.open`."""
        names = names_of(self.sets)
        if not names:
            raise InputError("`sets` must name at least one of bio, chem, cyber.")
        scoring = benchmark.check_scoring(names_of(self.scoring), self.permute)
        questions = {name: read_questions(f"wmdp:{name}", data_dir=self.data_dir) for name in names}
        asking = Asking(scoring=scoring, permute=self.permute, chat=self.chat, limit=self.limit)
        return partial(benchmark.prepare, sets=questions, asking=asking, name="wmdp", role="forget", seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class ChoiceSettings:
    """Any multiple-choice questions, by letter, by the options' texts, and without showing the options.

    Attributes:
        questions: Files (.json, .jsonl, .csv, .parquet) or named sets (wmdp:bio, hub:owner/name:config), one or a
            list; or a dictionary of them by the set's name.
        role: What a good unlearned model does: fails on them (forget), answers them (retain), or neither (none).
        scoring: Scorings, of letter (options listed, letters scored), answer (listed, texts scored) and cloze (not
            listed, texts scored).
        permute: Ask every question again in N other orders of its options.
        subject: Subject that the prompt names; None for each record's own.
        few_shot: File of solved questions; those of a question's subject are shown before it.
        shots: Number of solved questions shown, the first ones.
        chat: Wrap prompts by the tokenizer's chat template.
        data_dir: Directory that holds the named sets; None for $DISSECT_DATA, then the hub.
        limit: Use only the first N questions of each set.
        seed: Random seed of the orders and of the bootstrap.
    """

    source: ClassVar[str] = "scorings of lm-evaluation-harness"

    questions: str | Path | Sequence[str | Path] | Mapping[str, str | Path]
    role: str = "none"
    scoring: Names = SCORINGS
    permute: int = 0
    subject: str | None = None
    few_shot: str | None = None
    shots: int = 5
    chat: bool = False
    data_dir: str | Path | None = None
    limit: int | None = None
    seed: int = 0

    def open(self, _runtime: Runtime) -> Prepare:
        """Read the questions; see `Settings.open`."""
        scoring = benchmark.check_scoring(names_of(self.scoring), self.permute)
        role = benchmark.check_role(self.role)
        sets = {name: self._read(source) for name, source in self._sources().items()}
        few_shot = given(self.few_shot)
        asking = Asking(
            scoring=scoring,
            permute=self.permute,
            few_shot=self._read(few_shot) if few_shot else [],
            n_shots=self.shots,
            chat=self.chat,
            limit=self.limit,
        )
        return partial(benchmark.prepare, sets=sets, asking=asking, role=role, seed=self.seed)

    def _sources(self) -> dict[str, str | Path]:
        """Return the files by the name of their set."""
        if isinstance(self.questions, Mapping):
            return dict(self.questions)
        listed = [self.questions] if isinstance(self.questions, str | Path) else self.questions
        sources: dict[str, str | Path] = {}
        for source in listed:
            name = _set_name(str(source))
            if name in sources:
                raise InputError(f"`questions` has two sets called {name!r}, got {source}. Give the file another name.")
            sources[name] = source
        return sources

    def _read(self, source: str | Path) -> list[Question]:
        with naming("few_shot" if source == self.few_shot else "questions"):
            return read_questions(source, data_dir=self.data_dir, subject=self.subject)


def _set_name(source: str) -> str:
    """Return a set's name in the metrics: the file's, or the last word of a named set."""
    _, colon, rest = source.partition(":")
    if colon and not is_there(source):
        return rest.split("/")[-1].replace(":", "_")
    return Path(source).stem
