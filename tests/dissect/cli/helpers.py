"""Builders: tiny checkpoints on disk as a user would have them, ways to break them, and the command line in process."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from dissect.cli import main
from tests.command_lines import Outcome, call_main

VOCABULARY = 300
CONTEXT = 48
LAYERS = 3
NAMES = "Ada Ben Cleo Dan Eve Finn Gil Hal".split()
TOWNS = "Oslo Lima Cairo Kyoto Porto Quito Accra Delhi".split()


@dataclass(frozen=True)
class World:
    """Three checkpoints and a prompts file."""

    base: Path
    unlearned: Path
    control: Path
    data: Path

    def patch(self, out: Path | None, *more: str, **other: str | Path) -> list[str]:
        """Arguments of `dissect patch` on this world, with `base`, `unlearned` or `data` replaced.

        The chunk is given, since a measured one may differ between two runs, and with it the last bits.
        """
        paths = {"base": self.base, "unlearned": self.unlearned, "data": self.data, **other}
        named = [text for name, path in paths.items() for text in (f"--{name}", str(path))]
        place = [] if out is None else ["--out", str(out)]
        return ["patch", *named, *place, "--window", "1", "--sites", "mlp_coef", "--chunk-tokens", "100", *more]


def call(*arguments: str | Path) -> Outcome:
    """Run `dissect` in this process, as the console script does."""
    return call_main(main, *arguments)


def assert_refused(outcome: Outcome, *phrases: str, code: int = 2) -> None:
    """Exit status, nothing on stdout, and one line on stderr that says all of these."""
    assert outcome.code == code, outcome
    assert outcome.out == ""
    assert outcome.err.endswith("\n")
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("dissect: ")
    for phrase in phrases:
        assert phrase in lines[0], f"{phrase!r} is not in {lines[0]!r}"


def unfinished_files(path: Path) -> list[Path]:
    """Files that were being written."""
    return sorted(path.rglob("*.part"))


def build_tokenizer(vocabulary: int = VOCABULARY, *, corpus: str = "Question Answer born") -> PreTrainedTokenizerFast:
    """A byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join([corpus, *NAMES, *TOWNS])] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def build_llama(
    seed: int = 0, *, layers: int = LAYERS, width: int = 16, d_mlp: int = 24, vocabulary: int = VOCABULARY
) -> LlamaForCausalLM:
    """Grouped-query attention and weights of a scale that makes logits differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=d_mlp,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def build_neox() -> GPTNeoXForCausalLM:
    """The same sizes in another architecture."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config).eval()


def with_noise(model: PreTrainedModel, *, seed: int, scale: float = 0.05) -> PreTrainedModel:
    """The model with normal noise on every weight, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def save(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None, *, shard: str = "5GB"
) -> Path:
    """A checkpoint's directory, as save_pretrained writes it."""
    model.save_pretrained(path, max_shard_size=shard)
    (tokenizer or build_tokenizer()).save_pretrained(path)
    return path


def build_records(n: int = 6) -> list[dict[str, str]]:
    """Questions in groups of two, with answers of one and several tokens."""
    return [
        {
            "question": f"Where was {NAMES[i % 8]} {i} born?",
            "answer": TOWNS[i % 8] if i % 2 else f"in {TOWNS[i % 8]} by the sea",
            "group": f"family {i // 2}",
            "id": f"q{i}",
        }
        for i in range(n)
    ]


def write_records(path: Path, records: list[dict[str, str]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def copied(source: Path, place: Path) -> Path:
    """A copy of a checkpoint that may be broken."""
    return Path(shutil.copytree(source, place))


def edit_weights(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors in a checkpoint's one safetensors file."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def cut_short(file: Path) -> None:
    """Leave the first half of a file, as a broken download does."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
