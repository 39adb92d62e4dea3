"""A small data set of TOFU's shape, with text of our own, and a slow way to score it."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.unlearning.helpers import NAMES, TOWNS

Record = dict[str, Any]
MAX_NEW_TOKENS = 6


def build_records(places: list[int], *, paraphrases: bool = True, n_wrong: int = 3) -> list[Record]:
    """Who was born where, with other towns as wrong answers; of different lengths."""
    records = []
    for place in places:
        name, town = NAMES[place % 8], TOWNS[(3 * place) % 8]
        wrong = [TOWNS[(3 * place + step) % 8] for step in range(1, n_wrong + 1)]
        own = {"question": f"Where was {name} born{'?' * (1 + place // 8)}", "answer": f"in {town}" * (1 + place % 2)}
        if paraphrases:
            own |= {"paraphrased_question": f"Is {name} of", "paraphrased_answer": f"{town}, in fact"}
        records.append({**own, "perturbed_answer": [f"{other}, in fact" for other in wrong]})
    return records


SETS = {
    "forget01_perturbed": build_records([0, 1, 2, 3, 4]),
    "retain_perturbed": build_records([8, 9, 10, 11, 12, 13]),
    "real_authors_perturbed": build_records([16, 17, 18], paraphrases=False),
    "world_facts_perturbed": build_records([24, 25, 26, 27], paraphrases=False, n_wrong=2),
}


def write_lines(path: Path, records: list[Record]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    return path


def write_tofu(directory: Path, **changed: list[Record]) -> Path:
    """A directory that holds `tofu/` with the four files of forget01."""
    for name, records in {**SETS, **changed}.items():
        write_lines(directory / "tofu" / f"{name}.json", records)
    return directory


def teach(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record], *, steps: int) -> None:
    """Train on the answers until some of their tokens are right, in place."""
    texts = [
        [*tokenizer(f"{Slow.prompt(record['question'])} {record['answer']}")["input_ids"], tokenizer.eos_token_id]
        for record in records
    ]
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    labels = torch.tensor([text + [-100] * (width - len(text)) for text in texts])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    optimizer.zero_grad()


class Slow:
    """One text at a time, without a cache, in float64 of the same float32 logits."""

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model, self.tokenizer = model, tokenizer

    @staticmethod
    def prompt(question: str) -> str:
        return f"Question: {question}\nAnswer:"

    def tokens(self, question: str, answer: str) -> list[tuple[float, bool]]:
        """Log-probability of each of the answer's tokens and of the end, and whether it is the likeliest."""
        before = self.tokenizer(self.prompt(question))["input_ids"]
        ids = [*self.tokenizer(f"{self.prompt(question)} {answer}")["input_ids"], self.tokenizer.eos_token_id]
        assert ids[: len(before)] == before
        with torch.no_grad():
            log_p = self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return [
            (float(log_p[at - 1, ids[at]]), int(log_p[at - 1].argmax()) == ids[at])
            for at in range(len(before), len(ids))
        ]

    def nll(self, question: str, answer: str) -> float:
        tokens = self.tokens(question, answer)
        return -sum(log_p for log_p, _ in tokens) / len(tokens)

    def generate(self, question: str) -> str:
        ids = start = self.tokenizer(self.prompt(question))["input_ids"]
        for _ in range(MAX_NEW_TOKENS):
            with torch.no_grad():
                token = int(self.model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == self.tokenizer.eos_token_id:
                break
            ids = [*ids, token]
        return str(self.tokenizer.decode(ids[len(start) :], skip_special_tokens=True)).strip()
