"""Which positions are scored, in every format; batches; the base model's own answers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import dissect
from dissect import load_prompts
from dissect.models.model import Model
from dissect.prompts.prompts import Prompts
from dissect.prompts.records import Question, questions
from tests.dissect.helpers import RECORDS, build_model, build_pair, build_tokenizer, save_records
from unlearning.common.errors import InputError
from unlearning.data.chat import chat_format
from unlearning.data.concept_vectors import cut_continuation
from unlearning.data.question_answer import ANSWER_KEYS, MAX_PROMPT, read_examples

TOKENIZER = build_tokenizer()


def special_token_tokenizer(*, bos: bool = False, eos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer that puts special tokens around every text."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    template = f"{'<bos> ' * bos}$A{' <eos>' * eos}"
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
    )
    return tokenizer


def crossing_tokenizer() -> PreTrainedTokenizerFast:
    """Single letters, and one merge that takes a trailing space and the next letter into one token."""
    letters = ["a", "b", "c", "Ġ"]
    vocabulary = {token: index for index, token in enumerate(["<eos>", *letters, "Ġb", "Ġbc"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "b"), ("Ġb", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def load(tmp_path: Path, records: list[dict[str, Any]], tokenizer: Any = TOKENIZER) -> Prompts:
    return load_prompts(save_records(tmp_path / "prompts.json", records), tokenizer)


def test_the_scored_positions_predict_the_answers_tokens(tmp_path: Path) -> None:
    prompts = load(tmp_path, RECORDS)
    assert [item.id for item in prompts.items] == [record["id"] for record in RECORDS]
    assert [item.group for item in prompts.items] == [record["group"] for record in RECORDS]
    for item, record in zip(prompts.items, RECORDS, strict=True):
        assert TOKENIZER.decode(item.input_ids) == f"{record['prompt']} {record['answer']}"
        answer = [item.input_ids[position + 1] for position in item.scored]
        assert answer == TOKENIZER(" " + record["answer"])["input_ids"]
        assert item.n_answer_tokens == len(answer) == len(item.input_ids) - item.answer_start


@pytest.mark.parametrize(
    ("prompt", "answer", "start", "n_answer"),
    [
        ("a ", "bc", 1, 1),  # the prompt alone is [a, Ġ]: its length would miss the only token of the answer
        ("a", " bc", 1, 1),
        ("aa ", "bcb", 2, 2),
        ("a ", "cb", 2, 2),  # no merge: the space is a token of the prompt
    ],
)
def test_a_token_across_the_boundary_counts_to_the_answer(
    prompt: str, answer: str, start: int, n_answer: int, tmp_path: Path
) -> None:
    tokenizer = crossing_tokenizer()
    (item,) = load(tmp_path, [{"prompt": prompt, "answer": answer}], tokenizer).items
    assert item.answer_start == start
    assert item.n_answer_tokens == n_answer
    assert list(item.scored) == list(range(start - 1, len(item.input_ids) - 1))


WORDS = st.text(alphabet="Oslo inLm?.:é", min_size=1, max_size=12).filter(lambda text: text.strip() == text)


@settings(max_examples=60)
@given(prompt=WORDS, answer=WORDS, gap=st.sampled_from(["", " ", "\n"]))
def test_the_boundary_agrees_with_the_tokenizers_character_offsets(prompt: str, answer: str, gap: str) -> None:
    """The answer's first token is the first one that reaches beyond the prompt's last character."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (item,) = load(Path(folder), [{"prompt": prompt + gap, "answer": answer}]).items
    text = f"{prompt}{gap or ' '}{answer}"
    encoded = TOKENIZER(text, return_offsets_mapping=True)
    assert list(item.input_ids) == encoded["input_ids"]
    beyond = [index for index, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt + gap)]
    assert item.answer_start == beyond[0]


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True)])
def test_special_tokens_around_a_text_are_never_scored(bos: bool, eos: bool, tmp_path: Path) -> None:
    tokenizer = special_token_tokenizer(bos=bos, eos=eos)
    plain = load(tmp_path, RECORDS)
    special = load(tmp_path, RECORDS, tokenizer)
    assert tokenizer("Ada")["input_ids"] == [
        *[tokenizer.bos_token_id] * bos,
        *TOKENIZER("Ada")["input_ids"],
        *[tokenizer.eos_token_id] * eos,
    ]
    for ours, theirs in zip(special.items, plain.items, strict=True):
        assert list(ours.input_ids) == [*[tokenizer.bos_token_id] * bos, *theirs.input_ids]
        assert ours.answer_start == theirs.answer_start + bos
        assert ours.n_answer_tokens == theirs.n_answer_tokens


def test_questions_are_wrapped_and_prompts_are_not(tmp_path: Path) -> None:
    records = [
        {"question": "Who?", "answer": "Ada"},
        {"prompt": "Who?", "answer": "Ada"},
    ]
    path = save_records(tmp_path / "p.json", records)
    assert [item.prompt for item in load_prompts(path, TOKENIZER).items] == ["Question: Who?\nAnswer:", "Who?"]
    with pytest.warns(UserWarning, match="`template` is not used for 1 of the 2 records"):
        wrapped = load_prompts(path, TOKENIZER, template="Q {question} A")
    assert [item.prompt for item in wrapped.items] == ["Q Who? A", "Who?"]
    assert [item.id for item in wrapped.items] == ["0", "1"]
    assert [item.group for item in wrapped.items] == ["", ""]
    with pytest.raises(InputError, match="template.*{question}"):
        load_prompts(path, TOKENIZER, template="Q A")


def test_the_chat_template_wraps_without_a_second_bos(tmp_path: Path) -> None:
    tokenizer = special_token_tokenizer(bos=True)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    path = save_records(tmp_path / "p.json", [{"question": "Who?", "answer": "Ada Brook"}])
    wrapped, plain = load_prompts(path, tokenizer, chat=True), load_prompts(path, tokenizer)
    (item,) = wrapped.items
    assert plain.chat is None and wrapped.chat == chat_format(tokenizer)
    assert item.prompt == "<bos>[user] Who?\n[assistant] "
    assert item.input_ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(item.input_ids) == "<bos>[user] Who?\n[assistant] Ada Brook"
    assert tokenizer.decode(item.input_ids[item.answer_start :]).strip() == "Ada Brook"
    bare = save_records(tmp_path / "bare.json", [{"prompt": "Who?", "answer": "Ada Brook"}])
    assert load_prompts(bare, tokenizer, chat=True).items[0].input_ids == item.input_ids  # a prompt is a turn too
    with pytest.raises(InputError, match="no chat template"):
        load_prompts(path, build_tokenizer(), chat=True)
    with pytest.raises(InputError, match="`chat`.*`template`"):
        load_prompts(path, tokenizer, chat=True, template="{question}")


def test_a_prompt_that_is_rendered_already_begins_once(tmp_path: Path) -> None:
    tokenizer = special_token_tokenizer(bos=True)
    written, bare = (
        load(tmp_path, [{"prompt": f"{bos}Question: Who?\nAnswer:", "answer": "Ada"}], tokenizer).items[0]
        for bos in ("<bos>", "")
    )
    assert list(written.input_ids) == list(bare.input_ids)
    assert written.input_ids.count(tokenizer.bos_token_id) == 1


def test_json_lines_and_a_json_list_are_the_same_prompts(tmp_path: Path) -> None:
    lines = tmp_path / "p.jsonl"
    lines.write_text("\n".join(map(json.dumps, RECORDS)) + "\n", encoding="utf-8")
    assert load_prompts(lines, TOKENIZER).sha256 == load(tmp_path, RECORDS).sha256


def test_limit_takes_the_first_prompts(tmp_path: Path) -> None:
    path = save_records(tmp_path / "p.json", RECORDS)
    assert [item.id for item in load_prompts(path, TOKENIZER, limit=2).items] == ["a0", "a1"]
    assert len(load_prompts(path, TOKENIZER, limit=99)) == len(RECORDS)
    with pytest.raises(InputError, match="limit.*0"):
        load_prompts(path, TOKENIZER, limit=0)


def test_the_content_hash_changes_with_what_is_computed_and_with_nothing_else(tmp_path: Path) -> None:
    def changed(**fields: Any) -> list[dict[str, Any]]:
        return [{**RECORDS[0], **fields}, *RECORDS[1:]]

    original = load(tmp_path, RECORDS).sha256
    variants = [
        changed(answer="in Lima"),
        changed(prompt="Where?"),
        changed(group="Ben"),
        changed(id="z9"),
        RECORDS[:-1],
        [*RECORDS[1:], RECORDS[0]],
    ]
    hashes = [load(tmp_path, records).sha256 for records in variants]
    assert len({original, *hashes}) == len(variants) + 1
    elsewhere = save_records(tmp_path / "another-name.json", changed(note="nobody reads this"))
    assert load_prompts(elsewhere, TOKENIZER).sha256 == original


CONCEPT = {
    "id": 7,
    "Concept": "Ada",
    "QA": [" Where was Ada born?\n", "Who is Ben?"],
    "QA_with_answers": [
        "Question:  Where was Ada born?\n\n Answer: in Oslo.\nQuestion: Who is Ben?\n Answer: Hill",
        "Question: Who is Ben?\n Answer:\n\nBen Hill Question: Who",
    ],
    "answers_tokens_num": [4, 9],
}


def test_conceptvectors_answers_are_the_first_line_of_the_continuation(tmp_path: Path) -> None:
    prompts = load(tmp_path, [CONCEPT])
    assert [item.prompt for item in prompts.items] == [
        "Question:  Where was Ada born?\n\n Answer:",
        "Question: Who is Ben?\n Answer:",
    ]
    assert [item.answer for item in prompts.items] == ["in Oslo.", "Ben Hill"]
    assert [item.id for item in prompts.items] == ["7-0", "7-1"]
    assert {item.group for item in prompts.items} == {"Ada"}


def test_notebook_scoring_takes_rows_and_lengths_from_the_file(tmp_path: Path) -> None:
    prompts = load_prompts(save_records(tmp_path / "p.json", [CONCEPT]), TOKENIZER, scoring="notebook")
    for item, row, n in zip(prompts.items, CONCEPT["QA_with_answers"], CONCEPT["answers_tokens_num"], strict=True):
        ids = TOKENIZER(row)["input_ids"]
        assert list(item.input_ids) == ids
        assert list(item.scored) == list(range(len(ids) - n, len(ids)))
    assert prompts.pad_token_id == TOKENIZER.eos_token_id
    (batch,) = prompts.batches(1)
    assert batch.position_ids is None
    assert batch.next_tokens.tolist().count(-1) == 2  # nothing follows the last token of a row


@torch.no_grad()
def slow_greedy(model: Model, prompt: str, n: int) -> str:
    """One prompt, one token at a time, the whole sequence again for each."""
    ids = TOKENIZER(prompt)["input_ids"]
    new: list[int] = []
    while len(new) < n:
        token = int(model.hf(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token == TOKENIZER.eos_token_id:
            break
        new.append(token)
    return TOKENIZER.decode(new)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_bases_own_answers_are_its_greedy_continuations(family: str, tmp_path: Path) -> None:
    hf = build_model(family, vocab_size=len(TOKENIZER), tied=False, dtype=torch.float64)
    with torch.no_grad():
        hf.get_output_embeddings().weight[TOKENIZER("\n")["input_ids"]] = 0.0
    model = Model.wrap(hf, TOKENIZER, name="base")
    path = save_records(tmp_path / "p.json", RECORDS)
    prompts = load_prompts(path, TOKENIZER, answers="base", answers_from=model, max_new_tokens=9)
    expected = [cut_continuation(slow_greedy(model, str(record["prompt"]), 9)) for record in RECORDS]
    assert [item.answer for item in prompts.items] == expected
    assert len(set(expected)) > 2
    given = load_prompts(path, TOKENIZER, answers="given", answers_from=model)
    assert [item.answer for item in given.items] == [record["answer"] for record in RECORDS]


@pytest.mark.parametrize("lost", [{}, {"answers": "Ada"}, {"answer": None}, {"completion": None}])
def test_the_base_answers_only_when_it_is_asked_to(tmp_path: Path, lost: dict[str, Any]) -> None:
    hf = build_model("llama", vocab_size=len(TOKENIZER), tied=False, dtype=torch.float64)
    model = Model.wrap(hf, TOKENIZER, name="base")
    path = save_records(tmp_path / "p.json", [{"prompt": "Who was", "answer": "Ada"}, {"prompt": "Where", **lost}])
    with pytest.raises(InputError, match=f"p.json, record 2: .*keys are prompt{''.join(f', {key}' for key in lost)}"):
        load_prompts(path, TOKENIZER, answers_from=model)
    prompts = load_prompts(path, TOKENIZER, answers="base", answers_from=model, max_new_tokens=5)
    expected = [cut_continuation(slow_greedy(model, prompt, 5)) for prompt in ("Who was", "Where")]
    assert [item.answer for item in prompts.items] == expected
    assert "base model's own" in prompts.source and prompts.source.startswith(str(path))
    with pytest.raises(InputError, match="`answers_from`"):
        load_prompts(path, TOKENIZER, answers="base")


@pytest.mark.parametrize("key", ANSWER_KEYS)
def test_both_packages_read_an_answer_under_the_same_names(tmp_path: Path, key: str) -> None:
    path = save_records(tmp_path / "p.json", [{"question": "Where was Ada?", key: "Oslo"}])
    (scored,), (trained,) = load_prompts(path, TOKENIZER).items, read_examples(path)
    assert (scored.prompt, scored.answer) == (trained.prompt, trained.answer)


def test_the_base_answers_a_chat_prompt_that_begins_once(tmp_path: Path) -> None:
    tokenizer = special_token_tokenizer(bos=True)
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }} says"
    model = Model.wrap(build_model("llama", vocab_size=len(tokenizer), tied=False), tokenizer, name="base")
    seen: list[torch.Tensor] = []
    hook = model.hf.get_input_embeddings().register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    path = save_records(tmp_path / "p.json", [{"question": "Who?"}])
    load_prompts(path, tokenizer, chat=True, answers="base", answers_from=model, max_new_tokens=3)
    hook.remove()
    longest = max(seen, key=lambda ids: ids.shape[1])  # others hold one token: the cache is tried, and then used
    assert tokenizer.decode(longest[0]) == "<bos>Who? says"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_hold_every_token_and_every_scored_position(side: Any, batch_size: int, tmp_path: Path) -> None:
    prompts = load(tmp_path, RECORDS)
    batches = prompts.batches(batch_size, padding_side=side)
    assert [example for batch in batches for example in batch.examples] == list(range(len(RECORDS)))
    for batch in batches:
        assert len(batch.examples) <= batch_size
        scored: list[tuple[int, int]] = []
        for row, example in enumerate(batch.examples):
            item = prompts.items[example]
            real = batch.attention_mask[row].bool()
            assert tuple(batch.input_ids[row][real].tolist()) == item.input_ids
            assert batch.position_ids is not None
            assert batch.position_ids[row][real].tolist() == list(range(len(item.input_ids)))
            pads = (~real).nonzero()[:, 0].tolist()
            assert pads == list(range(len(pads)) if side == "left" else range(len(item.input_ids), len(real)))
            offset = len(pads) if side == "left" else 0
            scored += [(row, offset + position) for position in item.scored]
        assert list(zip(batch.rows.tolist(), batch.columns.tolist(), strict=True)) == scored
        following = [batch.input_ids[row, column + 1].item() for row, column in scored]
        assert batch.next_tokens.tolist() == following


@pytest.mark.parametrize("command", ["patch", "restore", "decompose", "probe", "behave", "verdict"])
def test_a_file_in_place_of_loaded_prompts_is_refused(command: str, tmp_path: Path) -> None:
    file = save_records(tmp_path / "questions.json", RECORDS)
    pair = build_pair("llama", tokenizer=TOKENIZER)
    arguments = (pair, file, file) if command == "behave" else (pair, file)
    with pytest.raises(InputError, match=r"`(prompts|forget)` must be loaded prompts.*load_prompts"):
        getattr(dissect, command)(*arguments)


@pytest.mark.parametrize("command", ["probe", "behave", "verdict"])
def test_a_file_of_retain_prompts_is_refused(command: str, tmp_path: Path) -> None:
    file = save_records(tmp_path / "questions.json", RECORDS)
    pair = build_pair("llama", tokenizer=TOKENIZER)
    with pytest.raises(InputError, match="`retain` must be loaded prompts"):
        getattr(dissect, command)(pair, load_prompts(file, pair.tokenizer), retain=file)


def ask(*records: dict[str, Any]) -> list[Question]:
    return list(
        questions([{"question": "Where?", "answer": "Oslo", **record} for record in records], "f.json", None, None)
    )


@pytest.mark.parametrize("right", ["Café", "  Café\n", "Cafe\u0301", "\u00a0Cafe\u0301"])
@pytest.mark.parametrize("key", ["wrong", "perturbed_answer"])
def test_the_right_answer_is_not_ranked_against_itself(right: str, key: str) -> None:
    with pytest.raises(InputError, match=f"f.json, record 2: the answer is also among the wrong ones .{key} has"):
        ask({}, {"answer": "Café", key: ["Lima", right]})
    (question,) = questions([{"question": "Where?", "answer": "Café", key: right}], "f.json", None, None, answers=False)
    assert question.wrong == (right,)  # the base may answer otherwise


def test_a_wrong_answer_that_is_given_twice_counts_once() -> None:
    (question,) = ask({"wrong": ["Lima", " Lima", "lima", "Café", "Cafe\u0301"]})
    assert question.wrong == ("Lima", "lima", "Café")


@pytest.mark.parametrize(
    ("records", "second", "first"),
    [
        ([{"id": "1"}, {"id": "1"}], 2, 1),
        ([{"id": "1"}, {"id": 2}, {"id": 1}], 3, 1),
        ([{"id": "1"}, {}], 2, 1),  # the second record without an id is 1
        ([{}, {}, {"id": 0}], 3, 1),
        ([{"id": ""}, {"id": ""}], 2, 1),
        ([{"id": "0-0"}, {"QA": ["Who?"], "id": 0}], 2, 1),
        ([{"QA": ["Who?", "Where?"], "id": "a"}, {"QA": ["Where?"], "id": "a"}], 2, 1),
    ],
)
def test_an_id_stands_for_one_record(records: list[dict[str, Any]], second: int, first: int) -> None:
    for record in records:
        if "QA" in record:
            record["QA_with_answers"] = [f"Question: {question}\n Answer: Ana" for question in record["QA"]]
    with pytest.raises(InputError, match=f"^f.json, record {second}: has the id .* of record {first};"):
        ask(*records)


def test_numbers_that_are_none_are_no_labels() -> None:
    for key in ("id", "group"):
        for value in (math.nan, math.inf, -math.inf):
            with pytest.raises(InputError, match=f'f.json, record 1: "{key}" must be text or a finite number'):
                ask({key: value})


@pytest.mark.parametrize("key", ["question", "prompt", "answer", "response", "wrong", "perturbed_answer", "QA"])
def test_a_text_that_is_too_long_is_refused_before_it_is_tokenised(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_PROMPT <= 2_000_000  # 4 seconds in a tokenizer
    monkeypatch.setattr("unlearning.data.question_answer.MAX_PROMPT", 1000)
    for length in (1000, 1001):
        long: Any = "a" * length
        record: dict[str, Any] = {"question": "Where?", "answer": "Oslo"}
        if key == "response":
            del record["answer"]
        if key == "QA":
            answered = "Question: Who?\n Answer: Ana"
            record = {"QA": ["Who?", long], "QA_with_answers": [answered, f"Question: {long[:9]}"]}
        else:
            record[key] = ["Lima", long] if key in ("wrong", "perturbed_answer") else long
        path = save_records(tmp_path / "p.json", [{"question": "Who?", "answer": "Ana"}, record])
        if length == 1000:
            assert key == "QA" or len(load_prompts(path, TOKENIZER)) == 2
            continue
        with pytest.raises(InputError, match=f"^{path}, record 2: .?{key}.? has 1001 characters, more than 1000"):
            load_prompts(path, None)  # type: ignore[arg-type]  # no tokenizer is asked
        if key in ("question", "prompt", "answer", "response"):
            with pytest.raises(InputError, match=f"^{path}, record 2: .{key}. has 1001 characters, more than 1000"):
                read_examples(path)
