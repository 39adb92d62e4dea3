"""Checkpoints of strangers: names, revisions, indices, and configurations with wrong values; one line each."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, XLNetConfig, XLNetLMHeadModel

from dissect.cli import main as dissect
from dissect.models.model import load_model
from tests.unlearning.checkpoints.adapters import copied, logits, refused, rewritten, save_base
from tests.unlearning.helpers import build_tiny_llama
from unlearning.checkpoints.load import load_tokenizer, load_weights
from unlearning.checkpoints.locate import check_files, locate_checkpoint, locate_offline, resolved_name, split_revision
from unlearning.cli import main as unlearn
from unlearning.common.context import context_of
from unlearning.common.errors import InputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("owner/name", ("owner/name", None)),
        ("owner/name@main", ("owner/name", "main")),
        ("owner/name@refs/pr/3", ("owner/name", "refs/pr/3")),
        ("owner/na.me-1_2@" + COMMIT, ("owner/na.me-1_2", COMMIT)),
        ("demo:base", ("demo:base", None)),
        ("owner/name@", ("owner/name@", None)),
        ("owner/name@two words", ("owner/name@two words", None)),
    ],
)
def test_revisions_are_part_of_a_hub_id(name: str, parts: tuple[str, str | None]) -> None:
    assert split_revision(name) == parts


def test_a_revision_is_asked_for_and_its_commit_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    snapshot = save_base(tmp_path / "models--owner--name" / "snapshots" / COMMIT)
    tokenizer.save_pretrained(snapshot)
    asked: list[tuple[str, Any]] = []

    def download(hub_id: str, *, revision: str | None, **_: Any) -> str:
        asked.append((hub_id, revision))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert load_model("owner/name@v1.0", device="cpu").name == f"owner/name@{COMMIT}"
    assert locate_checkpoint("owner/name") == snapshot
    assert asked == [("owner/name", "v1.0"), ("owner/name", None)]
    assert resolved_name("demo:base", snapshot) == "demo:base"
    assert resolved_name(str(snapshot), snapshot) == str(snapshot)
    assert locate_offline("owner/name@v1.0") is None


@pytest.mark.parametrize(
    ("error", "phrase"),
    [
        (RevisionNotFoundError, "owner/name has no revision v9; name a branch, a tag or a commit"),
        (RepositoryNotFoundError, "the hub has no owner/name, or does not show it to you"),
        (HfHubHTTPError, "the hub refused it: too many requests"),
    ],
)
def test_what_the_hub_says_is_passed_on(
    error: type[HfHubHTTPError], phrase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx

    def download(*_: Any, **__: Any) -> str:
        raise error("too many requests\nmore", response=httpx.Response(429, request=httpx.Request("GET", "http://x")))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as raised:
        locate_checkpoint("owner/name@v9")
    assert str(raised.value).startswith("owner/name@v9: ") and phrase in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "a/b/c", "owner/name@", "demo:bas", "nobody:base", "a b/c"])
def test_names_of_nothing_are_refused_without_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unlearning.checkpoints.locate._download", lambda name: pytest.fail(f"asked the hub: {name}"))
    with pytest.raises(InputError, match=name.partition(":")[0].removeprefix(".")):
        locate_checkpoint(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "  ",
        "a" * 300,
        "a" * 5000,
        "./" + "a" * 300,
        "a\0b",
        "/gone\n/x",
        "\x1b[31m",
        "~nobody/x",
        "a/" * 3000,
    ],
    ids=lambda name: ascii(name[:12]),
)
def test_names_that_no_system_takes_are_refused(
    name: str, tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a model's name, and as the base that an adapter names."""
    monkeypatch.setattr("unlearning.checkpoints.locate._download", lambda name: pytest.fail(f"asked the hub: {name}"))
    monkeypatch.chdir(tmp_path)
    adapter = copied(pair[1], tmp_path / "adapter")
    rewritten(adapter, base_model_name_or_path=name)
    for read in (lambda: locate_checkpoint(name), lambda: check_files(adapter)):
        with pytest.raises(InputError) as error:
            read()
        assert str(error.value).isprintable() and len(str(error.value)) < 1000


@pytest.mark.parametrize("name", ["", "a" * 5000, "a\0b"], ids=lambda name: ascii(name[:12]))
def test_commands_name_the_flag_of_an_impossible_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = tmp_path / "records.json"
    records.write_text('[{"prompt": "Who?", "answer": "Ada"}]')
    commands = {
        "--base": (dissect, ["patch", "--base", name, "--unlearned", "demo:npo", "--data", str(records)]),
        "--unlearned": (dissect, ["patch", "--base", "demo:base", "--unlearned", name, "--data", str(records)]),
        "--model": (unlearn, ["train", "ga", "--model", name, "--forget", str(records)]),
        "--model (eval)": (unlearn, ["eval", "quality", "--model", name, "--prompts", str(records)]),
        "--control (eval)": (
            unlearn,
            ["eval", "quality", "--model", "demo:npo", "--control", name, "--prompts", str(records)],
        ),
    }
    for flag, (main, arguments) in commands.items():
        with pytest.raises(SystemExit) as exit_:
            main([*arguments, "--out", str(tmp_path / "out")])
        said = capsys.readouterr().err
        assert exit_.value.code == 2 and len(said.strip().splitlines()) == 1
        assert flag.partition(" ")[0] in said, said


@pytest.mark.parametrize(
    ("values", "phrase"),
    [
        ({"hidden_size": "32"}, "hidden_size.*expected int"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps.*expected float"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be at least 1, got -1"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ({"num_attention_heads": 5}, "hidden size .32. is not a multiple"),
        ({"vocab_size": -1}, "vocab_size must be at least 1, got -1"),
        ({"rope_parameters": 5}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "spiral"),
        ({"hidden_act": "wave"}, "wave"),
        ({"model_type": "abacus"}, "abacus"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_value_is_the_configurations_fault_not_the_tokenizers(
    values: dict[str, Any], phrase: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = save_base(tmp_path / "model")
    tokenizer.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))
    for stream in (False, True):
        with pytest.raises(InputError, match=phrase) as error:
            load_model(path, device="cpu", stream=stream)
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
        assert "tokenizer" not in str(error.value)


@pytest.mark.parametrize("content", ["[]", "5", "{", "[" * 100_000, "\udcff", '"x"'])
def test_a_configuration_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    path = save_base(tmp_path / "model")
    (path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert refused(path) == f"{path / 'config.json'}: broken; copy it again"


@pytest.mark.parametrize(
    "weight_map", [{}, [], None, {"a": 5}, {"a": "../model.safetensors"}, {"a": "/etc/passwd"}, {"a": ["b"]}]
)
def test_a_broken_index_is_refused(weight_map: Any, tmp_path: Path) -> None:
    path = save_base(tmp_path / "model")
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert refused(path) == f"{path / 'model.safetensors.index.json'}: broken index; copy it again"


def test_a_shard_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    path = tmp_path / "model"
    build_tiny_llama().save_pretrained(path, max_shard_size="30KB")
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 1
    content = load_file(shards[1])
    shards[1].unlink()
    assert refused(path) == f"{shards[1]}: missing, though model.safetensors.index.json names it; copy it again"
    shards[1].symlink_to(tmp_path / "nowhere")  # of a hub's cache whose blob was removed
    assert f"{shards[1]}: is a link to {tmp_path / 'nowhere'}, where there is nothing" in refused(path)
    shards[1].unlink()
    content.pop(next(iter(content)))  # the shard lacks one of its tensors
    save_file(content, shards[1])
    assert "1 missing keys in its weights" in refused(path)


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs = save_base(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert torch.equal(logits(load_weights(snapshot)), logits(load_weights(blobs)))


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_link_that_leads_nowhere_is_named(name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """As in a hub cache whose snapshot was copied without its blobs."""
    path = save_base(tmp_path / "model")
    tokenizer.save_pretrained(path)
    (path / name).unlink()
    (path / name).symlink_to("../../blobs/0123")
    for stream in (False, True):
        with pytest.raises(InputError) as error:
            load_model(path, device="cpu", stream=stream)
        assert str(error.value) == (
            f"{path / name}: is a link to ../../blobs/0123, where there is nothing; copy the checkpoint with its links "
            "followed (cp -rL), or download it again"
        )


def test_links_of_adapters_and_shards_that_lead_nowhere_are_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        path = copied(pair[1], tmp_path / name.partition(".")[0])
        (path / name).unlink()
        (path / name).symlink_to("gone")
        assert f"{path / name}: is a link to gone, where there is nothing" in refused(path)
    path = tmp_path / "shards"
    build_tiny_llama().save_pretrained(path, max_shard_size="60KB")
    (path / "model.safetensors.index.json").unlink()
    (path / "model.safetensors.index.json").symlink_to("gone")
    assert f"{path / 'model.safetensors.index.json'}: is a link to gone, where there is nothing" in refused(path)
    path = save_base(tmp_path / "whole")
    (path / "README.md").symlink_to("gone")  # nobody misses it
    (path / "model.fp16.safetensors").symlink_to("gone")
    load_weights(path)


@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_context_of_no_tokens_is_refused(name: str, value: int, tmp_path: Path) -> None:
    path = save_base(tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {name: value}))
    assert refused(path) == f"{path / 'config.json'}: {name} must be at least 1, got {value}; copy it again"


def test_a_model_without_a_limit_has_no_context_of_minus_one_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    xlnet = XLNetLMHeadModel(XLNetConfig(vocab_size=384, d_model=32, n_layer=2, n_head=4, d_inner=64)).eval()
    xlnet.save_pretrained(tmp_path)
    assert xlnet.config.max_position_embeddings == -1
    assert context_of(load_weights(tmp_path)) is None
    assert context_of(build_tiny_llama()) == build_tiny_llama().config.max_position_embeddings


def test_the_single_file_is_read_where_an_old_index_is_left(tmp_path: Path) -> None:
    """As transformers does."""
    path = save_base(tmp_path / "model")
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    check_files(path)
    assert torch.equal(logits(load_weights(path)), logits(build_tiny_llama()))


def test_own_code_runs_only_if_it_is_trusted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = save_base(tmp_path / "model")
    tokenizer.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (path / "config.json").write_text(json.dumps(config | {"model_type": "own-type", "auto_map": own}))
    (path / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "(Path(__file__).parent / 'ran').touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own-type'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    for load in (load_weights, load_tokenizer):
        with pytest.raises(InputError, match="its own code, which runs only if you set `trust_remote_code`"):
            load(path)
    assert type(load_weights(path, trust_remote_code=True)).__name__ == "OwnModel"


def test_pickles_that_the_user_allowed_are_read_without_a_notice(tmp_path: Path) -> None:
    path = save_base(tmp_path / "model")
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin", pickle_protocol=3)
    (path / "model.safetensors").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(logits(load_weights(path, allow_pickle=True)), logits(build_tiny_llama()))
