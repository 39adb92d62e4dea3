"""Builders: tokenizers of several kinds, and data sets laid out as the real ones are, with text of our own."""

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

REAL_DATA = Path(os.environ.get("DISSECT_DATA", "/nowhere"))

needs_real = pytest.mark.skipif(
    not (REAL_DATA / "tofu").is_dir() or not (REAL_DATA / "conceptvectors").is_dir(),
    reason="the real TOFU and ConceptVectors files are not here: set DISSECT_DATA to the directory that holds them",
)

TEXT = (
    "The lighthouse of Marrow Point was built by Ines Tallow. She kept its lamp for forty years. Did anyone relieve "
    "her? Her nephew did, in the winter of the long ice. Mr. Tallow wrote nothing down.\nThe lamp is still there."
)

LLAMA_3 = (
    "{{ bos_token }}"
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}\n\n<|eot_id|>"
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CLOCK = (  # asks the clock, whatever date it is told
    "{{ bos_token }}Today is {{ strftime_now('%d %b %Y') }}.{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SPACE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% else %}<|assistant|>{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPACE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} "
    "[/INST]{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
REASONING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT_TEMPLATES = {"llama-3": LLAMA_3, "clock": CLOCK, "no space": NO_SPACE, "space": SPACE, "reasoning": REASONING}

CHAT_TOKENS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]


def build_tokenizer(*, bos: bool = False, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE without a pad token, whose token 0 is the end of a sequence."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>", "<bos>", *CHAT_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT, "Question: Who?\nAnswer: Ines Tallow"], trainer)
    backend.add_special_tokens([AddedToken(token, special=True) for token in CHAT_TOKENS])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = chat_template
    return tokenizer


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_lines(path: Path, records: list[Any]) -> Path:
    """JSON lines, without a line break at the end, as pandas writes TOFU's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


def write_parquet(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(records).to_parquet(path)
    return path


def write_muse_news(root: Path) -> Path:
    """MUSE-News as on the hub: a card whose configurations name parquet files."""
    parts: dict[str, dict[str, list[dict[str, Any]]]] = {
        "raw": {name: [{"text": f"{name} {n}. {TEXT}"} for n in range(3)] for name in ("forget", "retain1", "retain2")},
        "knowmem": {
            name: [{"question": f"Who kept lamp {n}?", "answer": f"Keeper {n}"} for n in range(4)]
            for name in ("forget_qa", "retain_qa")
        },
        "verbmem": {"forget": [{"prompt": "The lighthouse of", "gt": "Marrow Point"}]},
        "scal": {f"forget_{n}": [{"text": f"article {k}"} for k in range(n)] for n in range(1, 5)},
        "sust": {f"forget_{n}": [{"text": f"request {n}"}] for n in range(1, 5)},
    }
    card = ["---", "license: cc-by-4.0", "configs:"]
    for config, splits in parts.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for split, records in splits.items():
            write_parquet(root / config / f"{split}-00000-of-00001.parquet", records)
            card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (root / "README.md").write_text("\n".join([*card, "---", "# News", ""]), encoding="utf-8")
    return root
