"""Judges of completions: what each says of a text that was to be forgotten, in the four classes of
`unlearning.evaluation.metrics.familiarity.CLASSES`."""

import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from unlearning.common.errors import InputError
from unlearning.evaluation.metrics.familiarity import CLASSES

Judging = Callable[[str, str], int]
"""From a prompt and its completion to a class, 1 to 4."""


@dataclass(frozen=True)
class Judge:
    """A judge that is not the rule.

    Attributes:
        judging: the function.
        identity: what its verdicts depend on, beside prompt and completion.
    """

    judging: Judging
    identity: str

    def __call__(self, prompt: str, completion: str) -> int:
        """The class of a completion.

        Raises:
            InputError: the function gave something else.
        """
        found = self.judging(prompt, completion)
        if isinstance(found, bool) or found not in CLASSES:
            raise InputError(f"the judge {self.identity.split(' ')[0]} gave {found!r}; it should give 1, 2, 3 or 4")
        return int(found)


def judge_by_rule(prompt: str, completion: str, references: Sequence[str], subtle: Sequence[str] = ()) -> int:
    """Class 1 where the completion has a reference, 2 where it has a subtle theme, else 4.

    A phrase counts as whole words only, with any white space between its words. One that is written with a capital
    letter is looked for as it is written, or all in capitals (many a name is a word: Stone); one in small letters in
    any case. What the prompt has already does not count. The rule sees no paraphrase, and never says 3.

    Args:
        prompt: what was asked.
        completion: what the model wrote.
        references: names and ideas that only the text has.
        subtle: themes typical of it.
    """
    for found, phrases in ((1, references), (2, subtle)):
        if any(has_phrase(completion, phrase) and not has_phrase(prompt, phrase) for phrase in phrases):
            return found
    return 4


def has_phrase(text: str, phrase: str) -> bool:
    """Whether a text has a phrase, as `judge_by_rule` looks for it."""
    named = phrase != phrase.lower()
    forms = {phrase, phrase.upper()} if named else {phrase}
    return any(
        re.search(
            r"(?<!\w)" + r"\s+".join(map(re.escape, form.split())) + r"(?!\w)", text, 0 if named else re.IGNORECASE
        )
        for form in forms
    )


def load_judge(name: str) -> Judge:
    """A judge by `module:function`, a module on Python's path or in the working directory.

    Raises:
        InputError: the name has another form, or there is no such module or function.
    """
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise InputError(f"--judge {name}: write it as module:function")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"--judge {name}: there is no module {error.name!r} here or on Python's path") from None
    finally:
        sys.path.remove(here)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"--judge {name}: {module_name} has no function {function_name!r}")
    source = getattr(module, "__file__", None)
    digest = hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else "built in"
    return Judge(function, f"{name} {digest}")
