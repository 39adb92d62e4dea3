"""Commands on decoders whose forward takes no positions (Bloom, MPT), or that keep no cache (the first GPT)."""

import copy
import json
from pathlib import Path

import pytest

from dissect.cli import main as dissect
from tests.command_lines import call_main
from tests.dissect.families import build
from tests.dissect.helpers import RECORDS, change_weights, save_records
from tests.unlearning.helpers import build_tokenizer
from unlearning.cli import main as unlearn


@pytest.mark.parametrize("name", ["the first gpt", pytest.param("bloom", marks=pytest.mark.slow), "mpt"])
def test_the_base_answers_and_models_write(name: str, tmp_path: Path) -> None:
    hf = build(name)
    unlearned = copy.deepcopy(hf)
    change_weights(unlearned, scale=0.05)
    for role, model in (("base", hf), ("unlearned", unlearned)):
        model.save_pretrained(tmp_path / role)
        build_tokenizer().save_pretrained(tmp_path / role)
    data = save_records(tmp_path / "data.json", RECORDS)
    out = tmp_path / "patch"
    pair = ["--base", tmp_path / "base", "--unlearned", tmp_path / "unlearned", "--data", data, "--quiet"]
    patched = call_main(
        dissect, "patch", *pair, "--answers", "base", "--max-new-tokens", "3", "--limit", "2", "--control", "none",
        "--window", "1", "--sites", "attn_out", "--out", out,
    )  # fmt: skip
    assert patched.code == 0, patched.err
    krs = json.loads((out / "summary.json").read_text())
    assert krs
    wrote = call_main(
        unlearn, "eval", "quality", "--model", tmp_path / "unlearned", "--prompts", data, "--max-new-tokens", "3",
        "--limit", "2", "--out", tmp_path / "quality", "--quiet",
    )  # fmt: skip
    assert wrote.code == 0, wrote.err
