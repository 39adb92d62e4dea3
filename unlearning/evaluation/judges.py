"""Judges of completions.

A judge puts a completion into one of the four classes of `unlearning.evaluation.metrics.familiarity.CLASSES`.
"""

import hashlib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from unlearning.common.errors import InputError
from unlearning.evaluation.metrics.familiarity import CLASSES
from unlearning.evaluation.metrics.text_words import has_words

Judging = Callable[[str, str], int]
"""Takes a prompt and its completion and returns a class, 1 to 4."""


@dataclass(frozen=True)
class Judge:
    """A judge other than the rule.

    Attributes:
        judging: The function.
        identity: Text that identifies the function's source, on which its classes depend.
    """

    judging: Judging
    identity: str

    def __call__(self, prompt: str, completion: str) -> int:
        """Return the class of a completion.

        Args:
            prompt: The prompt.
            completion: Text that the model wrote.

        Returns:
            The class, 1 to 4.

        Raises:
            InputError: The function returned something else.
        """
        found = self.judging(prompt, completion)
        if isinstance(found, bool) or found not in CLASSES:
            raise InputError(f"the judge {self.identity.split(' ')[0]} must return 1, 2, 3 or 4, got {found!r}")
        return int(found)


def judge_by_rule(prompt: str, completion: str, references: Sequence[str], subtle: Sequence[str] = ()) -> int:
    """Return class 1 if the completion has a reference, 2 if it has a subtle theme, else 4.

    A phrase counts as whole words only (see `has_words`), with any white space between its words. A phrase with a
    capital letter matches as it is written, or all in capitals (many names are words: Stone); a phrase in small letters
    matches in any case. Phrases that the prompt has do not count. The rule misses paraphrases, and never returns 3.

    Args:
        prompt: The prompt.
        completion: Text that the model wrote.
        references: Names and ideas that only the text has.
        subtle: Themes typical of the text.

    Returns:
        The class: 1, 2 or 4.
    """
    for found, phrases in ((1, references), (2, subtle)):
        if any(has_phrase(completion, phrase) and not has_phrase(prompt, phrase) for phrase in phrases):
            return found
    return 4


def has_phrase(text: str, phrase: str) -> bool:
    """Return whether a text has a phrase, by the matching of `judge_by_rule`."""
    named = phrase != phrase.lower()
    forms = {phrase, phrase.upper()} if named else {phrase}
    return any(has_words(text, form, any_case=not named) for form in forms)


def load_judge(name: str) -> Judge:
    """Load a judge by `module:function`; the module is on Python's path or in the working directory.

    Returns:
        The judge, identified by a hash of the module's file.

    Raises:
        InputError: The name has another form, or there is no such module or function.
    """
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise InputError(f"`judge` must have the form module:function, got {name!r}")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"`judge` {name}: there is no module {error.name!r} here or on Python's path") from None
    finally:
        sys.path.remove(here)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"`judge` {name}: {module_name} has no function {function_name!r}")
    source = getattr(module, "__file__", None)
    digest = hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else "built in"
    return Judge(function, f"{name} {digest}")
