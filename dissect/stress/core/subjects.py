"""Who a question is about, found from the texts: its wording without the subject, and answers about another subject.

The subject of a question is its group. The subject's words are the words that at least half of the group's questions
share and not even half of the other groups use: the name, for people. The longest run of them in the questions is the
subject's name. A group of one question shares all of its words, so that there only rare words are the subject's.

An answer that names its subject ("Ann Lee was born in Rome") is told apart from an answer about somebody else by the
name alone. To exchange answers between subjects, the name is exchanged as well.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from dissect.prompts.prompts import Prompt
from dissect.stress.core.distractors import normal, with_answer_of
from unlearning.data.chat import ChatFormat
from unlearning.data.spans import encode_answer

SHARED = 0.5
"""Share of a group's questions that have to contain a word of its subject."""

RARE = {1: 0.1, 2: 0.5}
"""Maximum share of the other groups that use a word of the subject, by number of the group's questions; 2: or more."""

_BETWEEN = re.compile(r"[ \-.'’]{1,2}")
"""What can stand between two words of a name."""


@dataclass(frozen=True, eq=False)
class Questions:
    """Questions with what their texts tell of their subjects.

    Attributes:
        items: The questions with their answers.
        subjects: The subject of each: its group, or a key of its own without a group.
        templates: The words of each question, with one empty word where the subject is named.
        names: The name of each question's subject; empty for a subject of one question, whose name is not known.
        answers: Each answer in a form that is the same for the same answer about another subject: normalised, without
            the subject's name.
        own: For each question, the right answers to all questions about its subject, and to the same text, in that
            form.
        chat: Chat template that they were wrapped in, or None.
    """

    items: tuple[Prompt, ...]
    subjects: tuple[str, ...]
    templates: tuple[tuple[str, ...], ...]
    names: tuple[str, ...]
    answers: tuple[str, ...]
    own: tuple[frozenset[str], ...]
    chat: ChatFormat | None = None

    def answer_to(self, index: int, other: int) -> str:
        """Return the answer to another question, as an answer to this one: with the name of this one's subject."""
        return renamed(self.items[other].answer, self.names[other], self.names[index])

    def with_answer_to(self, index: int, other: int, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """Return a question with the answer to another one in place of its own, as `answer_to` writes it."""
        item, text = self.items[index], self.answer_to(index, other)
        if text == self.items[other].answer:
            return with_answer_of(item, self.items[other])
        span = encode_answer(tokenizer, item.prompt, text, chat=self.chat)
        return replace(
            item,
            answer=text,
            input_ids=tuple(span.input_ids),
            answer_start=span.answer_start,
            scored=range(span.answer_start - 1, len(span.input_ids) - 1),
            wrong=(),
        )


def read_questions(items: Sequence[Prompt], chat: ChatFormat | None = None) -> Questions:
    """Find the subjects of questions.

    Args:
        items: Questions with their answers.
        chat: Chat template that they were wrapped in, or None.

    Returns:
        The questions with what their texts tell.

    Examples:
        >>> from dissect import load_model, load_prompts
        >>> from dissect.stress.core.subjects import read_questions
        >>> from dissect.zoo import question_set
        >>> prompts = load_prompts(question_set("forget"), load_model("demo:base").tokenizer)
        >>> questions = read_questions(prompts.items)
        >>> questions.names[0], questions.templates[0]
        ('Noutuk Howai', ('question', 'where', 'was', '', 'born', 'answer'))
    """
    subjects = tuple(item.group or f"\0{index}" for index, item in enumerate(items))
    texts = [_words(item.prompt) for item in items]
    asked = Counter(subjects)
    within: Counter[tuple[str, str]] = Counter()
    for subject, text in zip(subjects, texts, strict=True):
        within.update((subject, word) for word in set(text))
    users = Counter(word for _, word in within)  # number of groups that use a word
    limit = {n: 1 + share * (len(asked) - 1) for n, share in RARE.items()}
    of_subject: dict[str, set[str]] = {subject: set() for subject in subjects}
    for (subject, word), n in within.items():
        if n >= SHARED * asked[subject] and users[word] <= limit[min(2, asked[subject])]:
            of_subject[subject].add(word)
    words_of = tuple(frozenset(of_subject[subject]) for subject in subjects)
    runs: dict[str, Counter[str]] = {subject: Counter() for subject in subjects}
    for item, subject, its_words in zip(items, subjects, words_of, strict=True):
        runs[subject].update(item.prompt[start:end] for start, end in _runs(item.prompt, its_words))
    name_of = {
        subject: max(found, key=lambda run: (len(_words(run)), found[run])) if found and asked[subject] > 1 else ""
        for subject, found in runs.items()
    }
    names = tuple(name_of[subject] for subject in subjects)
    words_of = tuple(frozenset(_words(name)) or words for name, words in zip(names, words_of, strict=True))
    answers = tuple(normal(renamed(item.answer, name, "\0")) for item, name in zip(items, names, strict=True))
    same: dict[str, set[str]] = {}
    for item, subject, answer in zip(items, subjects, answers, strict=True):
        for key in (subject, f"\0text {item.prompt}"):
            same.setdefault(key, set()).add(answer)
    return Questions(
        items=tuple(items),
        subjects=subjects,
        templates=tuple(
            tuple(word for word, _ in groupby("" if word in own else word for word in words))
            for words, own in zip(texts, words_of, strict=True)
        ),
        names=names,
        answers=answers,
        own=tuple(
            frozenset(same[subject] | same[f"\0text {item.prompt}"])
            for item, subject in zip(items, subjects, strict=True)
        ),
        chat=chat,
    )


def renamed(text: str, name: str, other: str) -> str:
    """Replace a name in a text: the whole by the whole, its end by the last word, its beginning by the first one.

    A part of the name next to another capitalised word is somebody else's name, such as a relative's, and stays. So
    does a word in small letters of a name in capitals: "may" is no "May Lee".

    Args:
        text: The text.
        name: The name to replace; empty for none.
        other: The name to put there; empty to leave the text as it is.

    Returns:
        The text with the other name.

    Examples:
        >>> from dissect.stress.core.subjects import renamed
        >>> renamed("Ann Lee met Bruce Lee. Ann smiled.", "Ann Lee", "Zoe Moss")
        'Zoe Moss met Bruce Lee. Zoe smiled.'
    """
    if not name or not other:
        return text
    ours, theirs = _words(name), other.split()
    parts = {tuple(ours): other}
    for n in range(len(ours) - 1, 0, -1):
        parts |= {tuple(ours[-n:]): theirs[-1], tuple(ours[:n]): theirs[0]}
    longest_first = "|".join(_BETWEEN.pattern.join(map(re.escape, words)) for words in parts)

    def replaced(match: re.Match[str]) -> str:
        words = tuple(_words(match[0]))
        before, after = text[: match.start()], text[match.end() :]
        relatives = re.search(r"\b[^\W\d_a-z]\w* $", before), re.match(r" [^\W\d_a-z]", after)
        of_another = words != tuple(ours) and (relatives[0] if words == tuple(ours[-len(words) :]) else relatives[1])
        return match[0] if of_another or (match[0].islower() and not name.islower()) else parts[words]

    return re.sub(rf"(?<!\w)(?:{longest_first})(?!\w)", replaced, text, flags=re.IGNORECASE)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _runs(text: str, words: frozenset[str]) -> list[tuple[int, int]]:
    """Return start and end of every run of the words in a text."""
    found: list[tuple[int, int]] = []
    for match in re.finditer(r"\w+", text):
        if match[0].lower() not in words:
            continue
        if found and _BETWEEN.fullmatch(text[found[-1][1] : match.start()]):
            found[-1] = (found[-1][0], match.end())
        else:
            found.append((match.start(), match.end()))
    return found
