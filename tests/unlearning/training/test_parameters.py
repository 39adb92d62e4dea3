"""What trains and in which numbers: a choice of parameters, adapters, optimizers, precisions, tokenizers and chats."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.unlearning.helpers import build_examples, build_tiny_llama
from tests.unlearning.small_world import flat_weights
from unlearning import Example, InputError, train
from unlearning.checkpoints.hashing import content_hash
from unlearning.checkpoints.load import load_weights
from unlearning.data.chat import chat_format
from unlearning.data.encoding import encode
from unlearning.data.question_answer import read_examples
from unlearning.evaluation import generation
from unlearning.evaluation.answers import answer_matches

FORGET, RETAIN = build_examples()[:4], build_examples()[4:]
SHARED: dict[str, Any] = {
    "forget": FORGET,
    "retain": RETAIN,
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "warmup_ratio": 0,
    "max_steps": 3,
    "logging_steps": 1,
    "progress": False,
    "device": "cpu",
}


def moved(model: PreTrainedModel, start: PreTrainedModel) -> set[str]:
    before = dict(start.named_parameters())
    return {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        ("npo", r"layers\.0\.mlp"),
        ("npo", "lm_head"),
        ("blur", "down_proj|norm"),
        ("rmu", "down_proj|norm"),
    ],
)
def test_only_the_named_parameters_move(method: str, pattern: str, model_dir: Path) -> None:
    """Not by a gradient and not by weight decay, which would shrink a frozen weight that the optimizer has."""
    settings = {**SHARED, "weight_decay": 0.5, "train_parameters": pattern}
    result = train(method, model=model_dir, **settings)
    start = build_tiny_llama()
    wanted = {name for name, _ in start.named_parameters() if re.search(pattern, name)}
    changed = moved(result.model, start)
    # RMU reads the output of the first block: gradients end there.
    assert changed == ({name for name in wanted if "layers.0." in name} if method == "rmu" else wanted)
    everything = {name for name, _ in start.named_parameters()}
    assert 0 < len(changed) < len(everything)
    if method == "npo":
        assert moved(train(method, model=model_dir, **SHARED).model, start) == everything


def test_a_choice_of_parameters_changes_what_is_clipped(model_dir: Path) -> None:
    """The norm is of the gradients that train, and the first loss is the same."""
    whole = train("npo", model=model_dir, **SHARED).history[0]
    part = train("npo", model=model_dir, train_parameters="mlp", **SHARED).history[0]
    assert part["loss"] == whole["loss"]
    assert 0 < part["grad_norm"] < whole["grad_norm"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_parameters": "encoder"}, "`train_parameters` must match at least one of the 21 parameters"),
        ({"train_parameters": "("}, "`train_parameters` must be a regular expression, got '(': missing )"),
        ({"train_parameters": "mlp", "lora_rank": 2}, "`lora_rank` and `train_parameters`"),
        ({"lora_rank": 2, "lora_targets": "nothing"}, "got 'nothing'"),
        ({"optimizer": "sgd"}, "`optimizer` must be adamw, adamw_8bit, lion, got 'sgd'"),
        ({"precision": "int8"}, "`precision` must be float32, bf16_mixed, fp16_mixed, bfloat16, got 'int8'"),
        ({"precision": "fp16_mixed"}, "fp16_mixed"),
        ({"seed": 2**32}, "`seed` must be below 4294967296, got 4294967296"),
        ({"chat": True}, "the tokenizer has no chat template; use --template"),
    ],
    ids=str,
)
def test_bad_choices_are_refused(options: dict[str, Any], message: str, model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        train("npo", model=model_dir, output_dir=tmp_path / "run", **{**SHARED, **options})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_parameters_that_the_loss_does_not_reach_are_refused(model_dir: Path) -> None:
    """RMU reads a block's output: nothing above it has a gradient."""
    for pattern in ("lm_head", r"layers\.1"):
        with pytest.raises(InputError) as error:
            train("rmu", model=model_dir, layer=0, train_parameters=pattern, **SHARED)
        assert "`train_parameters`" in str(error.value) and "the forget loss of rmu" in str(error.value)


def test_adapters_are_refused_where_whole_weights_are_needed(
    model_dir: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(InputError, match="`lora_rank` .* rmu"):
        train("rmu", model=model_dir, lora_rank=2, **SHARED)
    with pytest.raises(InputError, match="`lora_rank` .* task_vector"):
        train("task_vector", model=model_dir, lora_rank=2, **SHARED)
    with pytest.raises(InputError, match="`model` must be a directory or a hub id to save an adapter"):
        model = build_tiny_llama()
        train("npo", model=model, tokenizer=tokenizer, lora_rank=2, output_dir=tmp_path / "run", **SHARED)


@pytest.mark.parametrize("method", ["npo", "blur"])
def test_an_adapter_is_trained_saved_and_merged(method: str, model_dir: Path, tmp_path: Path) -> None:
    settings = {**SHARED, "learning_rate": 1e-2}
    out = tmp_path / "adapter"
    result = train(method, model=model_dir, output_dir=out, lora_rank=4, lora_alpha=8, **settings)
    trained = {name for name, parameter in result.model.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert sorted(path.name for path in out.iterdir() if "token" not in path.name) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "unlearning.json",
    ]
    record = json.loads((out / "unlearning.json").read_text())
    base = load_weights(model_dir)
    assert record["base_weights"] == content_hash(base, name="base")
    ids = torch.randint(0, 384, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = result.model(ids).logits
        assert (wanted - base(ids).logits).abs().max() > 0.1
        torch.testing.assert_close(load_weights(out)(ids).logits, wanted, atol=1e-4, rtol=0)
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), str(out)).eval()
        torch.testing.assert_close(plain(ids).logits, wanted, atol=1e-4, rtol=0)
    assert "library_name: peft" in (out / "README.md").read_text()
    again = train(method, model=model_dir, output_dir=out, lora_rank=4, lora_alpha=8, **settings)
    assert again.already_done
    with torch.no_grad():
        torch.testing.assert_close(again.model(ids).logits, wanted, atol=1e-4, rtol=0)


def test_the_best_adapter_is_kept(model_dir: Path, tmp_path: Path) -> None:
    settings = {**SHARED, "learning_rate": 3e-2, "lr_schedule": "constant", "max_steps": 8}
    kept = {"lora_rank": 4, "keep_best": "retain_nll"}
    result = train("npo", model=model_dir, output_dir=tmp_path / "run", **settings, **kept)
    values = {int(line["step"]): line["retain_nll"] for line in result.evaluations}
    best = min(values, key=lambda step: values[step])
    assert best == result.final["step"] and values[best] < values[0]
    short = train("npo", model=model_dir, **{**settings, "max_steps": best}, lora_rank=4)
    torch.testing.assert_close(flat_weights(result.model), flat_weights(short.model), atol=0, rtol=0)


def one_step_of(optimizer: str, weights: torch.Tensor, gradient: torch.Tensor, rate: float, decay: float) -> Any:
    """The first step from zero moments, as the papers have it."""
    shrunk = weights * (1 - rate * decay)
    if optimizer == "lion":
        return shrunk - rate * gradient.sign()
    return shrunk - rate * gradient / (gradient.abs() + 1e-8)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "lion"])
def test_an_optimizer_makes_its_first_step(optimizer: str, model_dir: Path) -> None:
    """Before and after of one step against the papers' formulas; of 8-bit Adam the small tensors are in float32."""
    model = load_weights(model_dir)
    gradients: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: gradients.update({name: p.grad.clone()}))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = {**SHARED, "max_steps": 1, "weight_decay": 0.1, "max_grad_norm": 0, "batch_size": 4}
    train("npo", model=model, optimizer=optimizer, **settings)
    for name, parameter in model.named_parameters():
        decay = 0.0 if "norm" in name else 0.1  # the parent leaves norms and biases out of it
        wanted = one_step_of(optimizer, before[name], gradients[name], 1e-3, decay)
        touched = gradients[name].abs() > 1e-5
        assert touched.any()
        off = (parameter - wanted).abs()[touched]
        assert off.max() < (2e-4 if optimizer == "adamw_8bit" else 2e-6), name


@pytest.mark.parametrize("precision", ["bf16_mixed", "bfloat16"])
@pytest.mark.parametrize("method", ["npo", "blur"])
def test_half_precision_is_near_float32(precision: str, method: str, model_dir: Path, tmp_path: Path) -> None:
    exact = train(method, model=model_dir, **SHARED)
    rounded = train(method, model=model_dir, precision=precision, output_dir=tmp_path / "run", **SHARED)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    assert {parameter.dtype for parameter in rounded.model.parameters()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype="auto").dtype == dtype
    for line, other in zip(rounded.history, exact.history, strict=True):
        assert line["loss"] != other["loss"]
        assert line["loss"] == pytest.approx(other["loss"], rel=0.05)
    if precision == "bf16_mixed":
        start = flat_weights(build_tiny_llama())
        went, exactly = flat_weights(rounded.model) - start, flat_weights(exact.model) - start
        assert torch.cosine_similarity(went, exactly, dim=0) > 0.95


@pytest.mark.parametrize("method", ["npo", "blur", "rmu"])
def test_checkpointed_activations_change_nothing(method: str, model_dir: Path) -> None:
    plain = train(method, model=model_dir, **SHARED)
    recomputed = train(method, model=model_dir, gradient_checkpointing=True, **SHARED)
    assert recomputed.history == plain.history
    torch.testing.assert_close(flat_weights(recomputed.model), flat_weights(plain.model), atol=0, rtol=0)
    assert recomputed.model.config.use_cache


def test_activations_are_really_computed_again(model_dir: Path) -> None:
    def passes(**options: Any) -> int:
        model = load_weights(model_dir)
        calls: list[int] = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        train("npo", model=model, **{**SHARED, "max_steps": 1}, **options)
        return len(calls)

    assert passes(gradient_checkpointing=True) == passes() + 2  # one for the forget and one for the retain batch


def test_a_tokenizer_without_a_pad_token_is_used_as_it_is(model_dir: Path, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    tokenizer.pad_token = None
    out = tmp_path / "run"
    without = train("npo", model=load_weights(model_dir), tokenizer=tokenizer, output_dir=out, eval_every=2, **SHARED)
    padded = train("npo", model=model_dir, eval_every=2, **SHARED)
    assert without.history == padded.history
    assert without.evaluations == padded.evaluations
    assert tokenizer.pad_token is None
    assert PreTrainedTokenizerFast.from_pretrained(out).pad_token is None


CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """One that writes <bos> itself, as its template does, and ends a turn by another token than a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<eos>", "<bos>", "<user>", "<assistant>", "<end>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{e.prompt} {e.answer}" for e in build_examples()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", chat_template=CHAT_TEMPLATE
    )


def test_a_chat_is_trained_and_answered_in_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No second <bos>, and an answer ends where the template ends a turn."""
    tokenizer = chat_tokenizer()
    questions = [
        {"question": example.prompt.removeprefix("Question: ").removesuffix("\nAnswer:"), "answer": example.answer}
        for example in build_examples()
    ]
    data = tmp_path / "retain.json"
    data.write_text(json.dumps(questions))
    prompts: list[list[int]] = []
    real = generation._generate

    def watched(model: Any, batch: list[list[int]], *rest: Any, **kwargs: Any) -> list[list[int]]:
        prompts.extend(batch)
        return real(model, batch, *rest, **kwargs)

    monkeypatch.setattr(generation, "_generate", watched)
    settings = {**SHARED, "retain": data, "forget": None, "batch_size": 8, "learning_rate": 1e-2, "max_steps": 25}
    result = train(
        "finetune",
        model=build_tiny_llama(),
        tokenizer=tokenizer,
        chat=True,
        eval_every=1000,
        eval_examples=8,
        **settings,
    )
    bos, opened, end = tokenizer.convert_tokens_to_ids(["<bos>", "<assistant>", "<end>"])
    assert len(prompts) == 16  # before and after
    for ids in prompts:
        assert ids[0] == bos and ids.count(bos) == 1 and ids[-1] == opened
    assert result.final["retain_exact"] == 1
    chat = chat_format(tokenizer)
    examples = [Example(chat.prompt(each["question"]), each["answer"]) for each in questions]
    spans = encode(tokenizer, examples, append_eos=True, max_length=None, chat=chat).spans
    assert {tuple(span.input_ids[: span.answer_start]) for span in spans} == {tuple(ids) for ids in prompts}
    assert all(span.input_ids[-1] == end for span in spans)
    # Taken for plain prompts they would begin twice, and the answers would not end.
    prompts.clear()
    wrong = answer_matches(result.model, tokenizer, examples, batch_size=8, max_new_tokens=12)
    assert all(ids[:2] == [bos, bos] for ids in prompts)
    assert wrong["exact"] < 1
    assert read_examples(data)  # the same file is plain questions and answers without --chat
