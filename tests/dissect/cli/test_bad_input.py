"""Bad input gets exit 2 and one line that says what is wrong and what to do, and leaves nothing half-written."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from tests.command_lines import call_main
from tests.dissect.cli.helpers import (
    CONTEXT,
    VOCABULARY,
    World,
    assert_refused,
    build_llama,
    build_neox,
    build_records,
    build_tokenizer,
    call,
    copied,
    cut_short,
    edit_weights,
    save,
    unfinished_files,
    with_noise,
    write_records,
)
from unlearning.cli import main as unlearn


@pytest.mark.parametrize(
    ("option", "value", "phrases"),
    [
        ("--sites", "mlp_coeff", ["--sites", "'mlp_coeff'", "did you mean 'mlp_coef'?", "resid_post"]),
        ("--sites", "attn_out,atn_out+mlp_out", ["--sites", "'atn_out'", "did you mean 'attn_out'?"]),
        ("--sites", "mlp_coef+mlp_coef", ["--sites", "mlp_coef+mlp_coef"]),
        ("--sites", " , ", ["--sites", "mlp_coef"]),
        ("--window", "4", ["--window", "odd", "got 4"]),
        ("--window", "0", ["--window", "odd", "got 0"]),
        ("--window", "-3", ["--window", "odd", "got -3"]),
        ("--window", "five", ["--window", "'five'"]),
        ("--window", "5", ["--window", "3 layers", "got 5"]),
        ("--window", "9" * 5000, ["--window", "odd", "'9999"]),
        ("--layers", "0-99999999999", ["--layers", "not a layer"]),
        ("--layers", "0-999999999", ["--layers", "between 0 and 2"]),
        ("--layers", "9" * 5000, ["--layers", "not a layer"]),
        ("--sites", "x" * 100_000, ["--sites", "'xxx"]),
        ("--data", "x" * 300, ["--data", "File name too long"]),
        ("--out", "x" * 300, ["File name too long", "another path"]),
        ("--base", "x" * 300, ["--base", "no such directory"]),
        ("--format", "gif", ["--format", "html, pdf, svg, png", "gif"]),
        ("--scoring", "paper", ["--scoring", "paper", "answer or notebook"]),
        ("--answers", "guessed", ["--answers", "guessed", "given or base"]),
        ("--engine", "warp", ["--engine", "reference", "warp"]),
        ("--device", "tpu", ["--device", "tpu"]),
        ("--device", "meta", ["--device", "meta"]),
        ("--device", "cuda:99", ["--device", "cuda:99"]),
        ("--dtype", "float8", ["--dtype", "float8", "float32, float64"]),
        ("--dtype", "bfloat16", ["--dtype", "bfloat16", "on a CPU", "float32"]),
        ("--dtype", "float16", ["--dtype", "float16", "on a CPU", "float32"]),
        ("--batch-size", "0", ["--batch-size must be at least 1"]),
        ("--seed", "-1", ["--seed must be at least 0"]),
        ("--limit", "0", ["--limit must be at least 1"]),
        ("--template", "Q: {q}", ["--template", "{question}"]),
        ("--control", "/no/where", ["/no/where", "no such directory"]),
        ("--widnow", "3", ["No such option: --widnow", "--window"]),
    ],
)
def test_option_is_refused(world: World, tmp_path: Path, option: str, value: str, phrases: list[str]) -> None:
    extra = ["--device", "cpu"] if option == "--dtype" else []
    assert_refused(call(*world.patch(tmp_path / "run", option, value, *extra)), *phrases)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "phrases"),
    [
        (["ptach"], ["No such command 'ptach'", "'patch'"]),
        (["patch", "--base", "demo:base"], ["Missing option '--unlearned'"]),
        (["patch", "--base", "./base", "--unlearned", "./npo"], ["--base: ./base: no such directory"]),
        (["plot"], ["Missing argument 'RUN_DIR'"]),
    ],
)
def test_command_is_refused(arguments: list[str], phrases: list[str]) -> None:
    assert_refused(call(*arguments), *phrases)


def test_chat_without_a_chat_template_is_refused(world: World, tmp_path: Path) -> None:
    assert_refused(call(*world.patch(tmp_path / "run", "--chat")), "no chat template", "use --template")


@pytest.mark.parametrize("which", ["base", "unlearned"])
@pytest.mark.parametrize(
    ("name", "phrases"),
    [
        ("/no/where", ["/no/where: no such directory", "name the checkpoint's directory"]),
        ("./nothing", ["./nothing: no such directory"]),
        ("nothing", ["nothing: no such directory", "hub id", "demo:base"]),
        ("demo:bse", ["demo:bse", "demo:base"]),
    ],
)
def test_missing_directory_is_refused(world: World, tmp_path: Path, which: str, name: str, phrases: list[str]) -> None:
    assert_refused(call(*world.patch(tmp_path / "run", **{which: name})), *phrases)
    assert not (tmp_path / "run").exists()


def test_file_instead_of_directory_is_refused(world: World, tmp_path: Path) -> None:
    file = world.base / "model.safetensors"
    assert_refused(call(*world.patch(tmp_path / "run", base=file)), f"{file}: is a file")


def test_hub_id_is_refused_where_the_hub_cannot_be_reached(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*_arguments: object, **_options: object) -> str:
        raise LocalEntryNotFoundError("no connection\nand a second line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    assert_refused(call(*world.patch(tmp_path / "run", base="lab/model")), "lab/model", "the hub cannot be reached")


def _remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def _write(name: str, text: str) -> Callable[[Path], None]:
    return lambda path: _ignore((path / name).write_text(text))


def _ignore(_value: object) -> None:
    return None


def _no_tokenizer(path: Path) -> None:
    for file in path.glob("tokenizer*"):
        file.unlink()


def _drop_a_key(path: Path) -> None:
    edit_weights(path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def _poison(value: float) -> Callable[[Path], None]:
    def poison(path: Path) -> None:
        edit_weights(path, lambda tensors: tensors["model.layers.2.mlp.down_proj.weight"].view(-1)[5:7].fill_(value))

    return poison


def _configure(key: str, value: object) -> Callable[[Path], None]:
    def configure(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))

    return configure


def _pickled(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("broken", "phrases"),
    [
        (lambda path: cut_short(path / "model.safetensors"), ["model.safetensors: cut short", "copy it again"]),
        (_write("model.safetensors", ""), ["model.safetensors: cut short", "copy it again"]),
        (_remove("model.safetensors"), ["weights are read from safetensors files, and there are none"]),
        (_pickled, ["only pickled weights", "--allow-pickle"]),
        (_drop_a_key, ["1 missing keys", "model.layers.1.mlp.up_proj.weight", "do not belong to its config.json"]),
        (_configure("num_hidden_layers", 4), ["9 missing keys", "model.layers.3."]),
        (_configure("intermediate_size", 32), ["mlp.down_proj.weight has shape (16, 24)", "wants (16, 32)"]),
        (_configure("model_type", "abacus"), ["transformers cannot load it", "abacus"]),
        (_write("config.json", '{"model_type": "lla'), ["config.json: broken", "copy it again"]),
        (_remove("config.json"), ["no config.json", "name the directory that holds the checkpoint"]),
        (_no_tokenizer, ["no tokenizer", "copy tokenizer.json and tokenizer_config.json beside the weights"]),
        (_remove("tokenizer.json"), ["the tokenizer cannot be read", "copy tokenizer.json"]),
        (_write("tokenizer.json", '{"version": "1.0", "mod'), ["the tokenizer cannot be read", "copy tokenizer.json"]),
        (_write("tokenizer.json", "{}"), ["the tokenizer cannot be read", "copy tokenizer.json"]),
        (_poison(float("nan")), ["2 of 384 values of the tensor model.layers.2.mlp.down_proj.weight are NaN"]),
        (_poison(float("-inf")), ["2 of 384 values of the tensor model.layers.2.mlp.down_proj.weight are NaN"]),
    ],
)
def test_broken_checkpoint_is_refused(
    world: World, tmp_path: Path, broken: Callable[[Path], None], phrases: list[str]
) -> None:
    checkpoint = copied(world.unlearned, tmp_path / "broken")
    broken(checkpoint)
    outcome = call(*world.patch(tmp_path / "run", unlearned=checkpoint))
    assert_refused(outcome, str(checkpoint), *phrases)
    assert not (tmp_path / "run").exists()


def _cut_a_shard(path: Path) -> str:
    file = sorted(path.glob("*.safetensors"))[1]
    cut_short(file)
    return f"{file}: cut short"


def _lose_a_shard(path: Path) -> str:
    file = sorted(path.glob("*.safetensors"))[-1]
    file.unlink()
    return f"{file}: missing, though model.safetensors.index.json names it"


def _break_the_index(path: Path) -> str:
    file = path / "model.safetensors.index.json"
    cut_short(file)
    return f"{file}: broken index"


def _index_of_nothing(path: Path) -> str:
    file = path / "model.safetensors.index.json"
    file.write_text('["model.safetensors"]')
    return f"{file}: broken index"


@pytest.mark.parametrize("broken", [_cut_a_shard, _lose_a_shard, _break_the_index, _index_of_nothing])
def test_broken_shards_are_refused(world: World, tmp_path: Path, broken: Callable[[Path], str]) -> None:
    checkpoint = save(tmp_path / "sharded", with_noise(build_llama(), seed=1), shard="20KB")
    assert len(list(checkpoint.glob("*.safetensors"))) > 2
    expected = broken(checkpoint)
    assert_refused(call(*world.patch(tmp_path / "run", unlearned=checkpoint)), expected, "copy it again")


def test_pickled_weights_are_read_where_they_are_allowed_by_name(world: World, tmp_path: Path) -> None:
    checkpoint = copied(world.unlearned, tmp_path / "pickled")
    _pickled(checkpoint)
    outcome = call(*world.patch(tmp_path / "run", "--allow-pickle", "--quiet", unlearned=checkpoint))
    assert (outcome.code, outcome.err) == (0, "")  # the base beside it is safetensors
    (checkpoint / "pytorch_model.bin").write_bytes(b"not a pickle")
    outcome = call(*world.patch(tmp_path / "other", "--allow-pickle", unlearned=checkpoint))
    assert_refused(outcome, str(checkpoint), "pickled weights are broken", "copy them again")


def test_weights_without_a_place_in_the_model_are_named(world: World, tmp_path: Path) -> None:
    checkpoint = copied(world.unlearned, tmp_path / "longer")
    edit_weights(checkpoint, lambda tensors: tensors.update({"model.layers.3.extra": torch.ones(2)}))
    outcome = call(*world.patch(tmp_path / "run", "--quiet", unlearned=checkpoint))
    assert outcome.code == 0
    assert outcome.err.startswith(f"dissect: warning: {checkpoint}: 1 tensors")
    assert "model.layers.3.extra" in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (build_neox, "architecture: LlamaForCausalLM and GPTNeoXForCausalLM"),
        (lambda: build_llama(layers=2), "layers: 3 and 2"),
        (lambda: build_llama(width=32), "d_model: 16 and 32"),
        (lambda: build_llama(d_mlp=40), "d_mlp: 24 and 40"),
    ],
)
@pytest.mark.parametrize("role", ["unlearned", "control"])
def test_models_that_are_no_pair_are_refused(
    world: World, tmp_path: Path, build: Callable[[], PreTrainedModel], what: str, role: str
) -> None:
    other = save(tmp_path / "other", build())
    outcome = call(*world.patch(tmp_path / "run", **{role: other}))
    assert_refused(outcome, str(world.base), str(other), f"differ in {what}")
    assert not (tmp_path / "run").exists()


def test_prompts_are_asked_for_where_the_base_is_there(world: World, tmp_path: Path) -> None:
    arguments = [
        "patch",
        "--base",
        str(world.base),
        "--unlearned",
        str(world.unlearned),
        "--out",
        str(tmp_path / "run"),
    ]
    assert_refused(call(*arguments), "--data is missing", ".jsonl")


def test_tokenizers_that_differ_give_a_warning_and_a_result(world: World, tmp_path: Path) -> None:
    other = copied(world.unlearned, tmp_path / "other")
    build_tokenizer(290).save_pretrained(other)
    outcome = call(*world.patch(tmp_path / "run", "--quiet", unlearned=other))
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith(f"dissect: warning: the tokenizers of {world.base} and {other} differ")
    assert f"{world.base}'s is used for both" in outcome.err
    assert (tmp_path / "run" / "results.parquet").is_file()


def test_tokenizer_with_tokens_that_the_model_lacks_is_refused(world: World, tmp_path: Path) -> None:
    words = " ".join(f"born{i}" for i in range(200))
    tokenizer = build_tokenizer(VOCABULARY + 200, corpus=f"{words} {words} Question: Where was born?")
    base = copied(world.base, tmp_path / "base")
    unlearned = copied(world.unlearned, tmp_path / "unlearned")
    tokenizer.save_pretrained(base)
    tokenizer.save_pretrained(unlearned)
    data = write_records(tmp_path / "q.jsonl", [{"question": "born7 born199 born55?", "answer": "born123 born77"}])
    outcome = call(*world.patch(tmp_path / "run", base=base, unlearned=unlearned, data=data))
    assert_refused(outcome, "prompt 0 has the token", str(base), "300", "the tokenizer belongs to another model")


GOOD = '{"question": "Where?", "answer": "Oslo"}\n'


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        (GOOD + '\n{"question": "Where?", "answer": \n', ["line 3: broken JSON"]),
        ('[\n{"question": "Where?", "answer": "Oslo"},\n{"question": }\n]', ["line 3: broken JSON"]),
        (GOOD + "5\n", ["line 2: expected an object, got int"]),
        ('[{"question": "Where?", "answer": "Oslo"}, []]', ["record 2: expected an object, got list"]),
        ("", ["the file is empty", "JSON lines"]),
        (" \n\n", ["the file is empty", "JSON lines"]),
        ("[]", ["the list is empty"]),
        (
            GOOD + '{"text": "Where?", "answer": "Oslo"}',
            ["record 2", '"prompt" or "question"', "its keys are text, answer"],
        ),
        (GOOD + '{"question": " ", "answer": "Oslo"}', ["record 2", '"prompt" or "question" with text']),
        (GOOD + '{"question": "Where?", "answer": ""}', ["record 2: the answer is empty", "remove the record"]),
        (GOOD + '{"question": "Where?", "answer": " \\n"}', ["record 2: the answer is empty", "remove the record"]),
        (GOOD + '{"question": "How many?", "answer": 5}', ['record 2: "answer" must be text, got int']),
        ('{"QA": ["Where?", "When?"], "QA_with_answers": ["Question: Where?"]}', ["record 1: QA_with_answers"]),
        ('{"QA": "Where?"}', ["record 1: QA"]),
    ],
)
def test_broken_prompts_file_is_refused(world: World, tmp_path: Path, text: str, phrases: list[str]) -> None:
    data = tmp_path / "questions.json"
    data.write_text(text)
    assert_refused(call(*world.patch(tmp_path / "run", data=data)), str(data), *phrases)
    assert not (tmp_path / "run").exists()


def test_prompts_file_that_is_no_text_file_is_refused(world: World, tmp_path: Path) -> None:
    data = tmp_path / "questions.json"
    assert_refused(call(*world.patch(tmp_path / "run", data=data)), f"{data}: no such file")
    assert_refused(call(*world.patch(tmp_path / "run", data=tmp_path)), f"{tmp_path}: is a directory", "name a .json")
    data.write_bytes('{"question": "Où?", "answer": "Málaga"}'.encode("latin-1"))
    assert_refused(call(*world.patch(tmp_path / "run", data=data)), f"{data}: not UTF-8 text (byte 15)", "convert it")


def test_answer_longer_than_the_context_is_refused(world: World, tmp_path: Path) -> None:
    records = [*build_records(2), {"question": "Where?", "answer": "Oslo and " * CONTEXT, "id": "long"}]
    outcome = call(*world.patch(tmp_path / "run", data=write_records(tmp_path / "q.jsonl", records)))
    assert_refused(outcome, "prompt long has", f"context of {world.base} is {CONTEXT}", "shorten or remove")


def test_run_directory_of_another_configuration_is_refused(
    world: World, finished: tuple[Path, object], tmp_path: Path
) -> None:
    run = finished[0]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    outcome = call(*world.patch(run, "--sites", "attn_out"))
    assert_refused(
        outcome,
        f"{run} holds another run",
        "its sites is mlp_coef,attn_out,mlp_coef+attn_out, not attn_out",
        "its windows is 3, not 1",
        "its seed is 7, not 0",
        "Give another directory as --out",
    )
    fewer = write_records(tmp_path / "fewer.jsonl", build_records(4))
    assert_refused(call(*world.patch(run, data=fewer)), "its hash of data is", "its examples is 6, not 4")
    assert_refused(call(*world.patch(run, unlearned=world.control)), "its hash of unlearned is")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_directory_that_is_no_run_is_refused_and_left_alone(world: World, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("chapter one")
    assert_refused(call(*world.patch(tmp_path)), f"{tmp_path}: not a run directory", "an empty or a new directory")
    assert_refused(call(*world.patch(tmp_path / "thesis.tex")), "not a run directory", "an empty or a new directory")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"format": 1}', b"\xff\xfe\x00", b""])
def test_broken_run_record_is_refused(world: World, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    assert_refused(call(*world.patch(tmp_path)), f"{tmp_path / 'run.json'}: ", " the ")
    assert (tmp_path / "run.json").read_bytes() == content


def test_place_that_cannot_be_written_to_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_refused(call(*world.patch(tmp_path / "file" / "run")), "file/run: cannot be written", "Not a directory")
    assert_refused(call(*world.patch(Path("/proc/run"))), "/proc/run: cannot be written")


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing got in the way of."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert call(*world.patch(run, "--quiet")).code == 0
    return run


@pytest.fixture(scope="module")
def part(world: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the one part of that run is called, which is kept only while the run goes on."""
    run = tmp_path_factory.mktemp("runs") / "paused"
    with pytest.MonkeyPatch.context() as patch:

        def stop(*_arguments: object, **_options: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("dissect.sweeps.passes.in_order", stop)
        assert call(*world.patch(run, "--quiet")).code == 130
    (file,) = (run / "parts").iterdir()
    return f"parts/{file.name}"


@pytest.mark.parametrize("name", ["run.json", "part", "results.parquet", "summary.json", "figures/krs.html"])
def test_full_disk_is_reported_and_the_run_goes_on_when_there_is_room(
    world: World, whole: Path, part: str, tmp_path: Path, name: str
) -> None:
    run = tmp_path / "run"
    file = run / (part if name == "part" else name)
    half = file.with_name(f".{file.name}.{os.getpid()}.part")

    def fill_the_disk(_path: Path) -> None:
        # /dev/full: the kernel itself refuses what is written there.
        half.parent.mkdir(parents=True, exist_ok=True)
        half.symlink_to("/dev/full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unlearning.common.runs._sweep_up", fill_the_disk)
        outcome = call(*world.patch(run))
    assert_refused(outcome, f"{file}: the disk is full", "free some space and rerun the same command")
    assert unfinished_files(run) == []
    assert not file.exists()
    assert call(*world.patch(run, "--quiet")).code == 0
    assert file.is_file() or name == "part"
    assert (run / "results.parquet").read_bytes() == (whole / "results.parquet").read_bytes()
    assert unfinished_files(run) == []


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--data", "/no/questions.json", "/no/questions.json: no such file"),
        ("--sites", "mlp", "'mlp'"),
        ("--window", "2", "--window"),
        ("--format", "gif", "--format must be"),
        ("--scoring", "paper", "--scoring must be"),
        ("--answers", "guessed", "--answers must be"),
    ],
)
def test_what_needs_no_model_is_refused_before_any_is_loaded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, value: str, words: str
) -> None:
    def load(*_arguments: object, **_options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("dissect.models.pair.load_pair", load)
    assert_refused(call(*world.patch(tmp_path / "run", option, value)), words)


@pytest.mark.parametrize("base", ["demo:bas", "./nowhere", "nowhere"])
def test_a_misspelt_base_is_named_before_the_data_are_missed(base: str) -> None:
    outcome = call("patch", "--base", base, "--unlearned", "demo:npo")
    assert_refused(outcome, "--base", base)
    assert "--data" not in outcome.err


def test_another_order_of_neurons_is_refused_and_align_undoes_it(world: World, tmp_path: Path) -> None:
    other = copied(world.unlearned, tmp_path / "other")

    def turn(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "mlp." in name:
                tensors[name] = tensor.roll(5, 1 if "down_proj" in name else 0).contiguous()

    edit_weights(other, turn)
    outcome = call(*world.patch(tmp_path / "run", unlearned=other))
    assert_refused(outcome, "another basis", "order of the MLP neurons", "Set --align")
    whole = call(*world.patch(tmp_path / "whole", "--json", "--quiet"))
    outcome = call(*world.patch(tmp_path / "run", "--align", "--json", "--quiet", unlearned=other))
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads(outcome.out)["peaks"] == json.loads(whole.out)["peaks"]


def test_a_model_with_code_of_its_own_names_the_flag_in_both_packages(world: World, tmp_path: Path) -> None:
    own = copied(world.unlearned, tmp_path / "own")
    _configure("model_type", "own-type")(own)
    _configure("auto_map", {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})(own)
    (own / "own.py").write_text("from pathlib import Path\n(Path(__file__).parent / 'ran').touch()\n")
    said = "own code, which runs only if you set --trust-remote-code"
    assert_refused(call(*world.patch(tmp_path / "run", unlearned=own)), str(own), said)
    data = write_records(tmp_path / "q.jsonl", build_records(2))
    train = ("train", "ga", "--model", own, "--forget", data, "--out", tmp_path / "trained")
    for command in (train, ("eval", "quality", "--model", own, "--prompts", data)):
        outcome = call_main(unlearn, *command)
        assert outcome.code == 2 and said in outcome.err and outcome.err.count("\n") == 1
    assert not (own / "ran").exists()
