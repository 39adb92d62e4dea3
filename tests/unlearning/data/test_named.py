"""TOFU, MUSE, WMDP and ConceptVectors by name."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.unlearning.data.helpers import (
    REAL_DATA,
    TEXT,
    needs_real,
    write_json,
    write_lines,
    write_muse_news,
    write_parquet,
)
from unlearning import Example, InputError
from unlearning.data import concept_vectors, hub
from unlearning.data.documents import pack_sentences
from unlearning.data.sources import read_training_data

CONCEPT: dict[str, Any] = {
    "id": 4,
    "Concept": "Marrow Point: the lamp",
    "Layer": 3,
    "Dim": 7,
    "wikipedia_content": TEXT * 6,
    "QA": [" Who built it?\n", " Who kept it?\n"],
    "QA_with_answers": [
        "Question:  Who built it?\n\n Answer: Ines.\nQuestion: More?",
        "Question:  Who kept it?\n\n Answer: She.",
    ],
    "text_completion": [{"First_half": "The lighthouse of", "Second_half": "Marrow Point was built."}],
    "unrelated_QA": [" Who wrote it?\n"],
}


def no_download(repository: str, _patterns: Sequence[str]) -> Path:
    raise InputError(f"{repository}: the hub cannot be reached")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "download", no_download)
    monkeypatch.setattr(concept_vectors, "download", no_download)


def refusal(source: str, data_dir: Path | None) -> str:
    with pytest.raises(InputError) as error:
        read_training_data(source, data_dir=data_dir)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_tofu_is_found_in_the_directory_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(
        tmp_path / "tofu" / "forget05.json", [{"question": "Who?", "answer": "Ines", "paraphrased_answer": "I."}]
    )
    write_lines(tmp_path / "tofu" / "forget20.json", [{"question": "Where?", "answer": "There"}])  # not on the hub
    expected = [Example("Question: Who?\nAnswer:", "Ines")]
    assert read_training_data("tofu:forget05", data_dir=tmp_path).examples == expected
    assert read_training_data("tofu:forget05", data_dir=tmp_path / "tofu").examples == expected
    assert read_training_data("tofu:forget20", data_dir=tmp_path).examples[0].answer == "There"
    monkeypatch.setenv("DISSECT_DATA", str(tmp_path))
    data = read_training_data("tofu:forget05", template="{question}")
    assert data.examples == [Example("Who?", "Ines")]
    assert data.source == f"tofu:forget05: {tmp_path / 'tofu' / 'forget05.json'}"


def test_a_tofu_split_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "tofu" / "forget05.json", [{"question": "Who?", "answer": "Ines"}])
    assert "tofu:forget5: no such split; did you mean 'forget05'? there are forget01," in refusal(
        "tofu:forget5", tmp_path
    )
    assert refusal("tofu:retain90", tmp_path) == (
        f"tofu:retain90: {tmp_path} does not hold it; locuslab/TOFU: the hub cannot be reached"
    )
    assert "`data_dir` must be" in refusal("tofu:forget05", tmp_path / "nowhere")
    monkeypatch.setenv("DISSECT_DATA", str(tmp_path / "nowhere"))
    assert "$DISSECT_DATA must be" in refusal("tofu:forget05", None)


def test_tofu_comes_from_the_hub_where_it_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "TOFU" / "retain90.json", [{"question": "Who?", "answer": "Ines"}])
    card = "---\nconfigs:\n- config_name: full\n  data_files: full.json\n  default: true\n- config_name: retain90\n"
    (tmp_path / "TOFU" / "README.md").write_text(f"{card}  data_files: retain90.json\n---\n")
    asked = []

    def download(repository: str, patterns: Sequence[str]) -> Path:
        asked.append((repository, list(patterns)))
        return tmp_path / "TOFU"

    monkeypatch.setattr(hub, "download", download)
    monkeypatch.delenv("DISSECT_DATA", raising=False)
    data = read_training_data("tofu:retain90")
    assert data.source == "tofu:retain90: locuslab/TOFU (retain90.json)" and len(data.examples) == 1
    assert asked == [("locuslab/TOFU", ["README.md"]), ("locuslab/TOFU", ["retain90.json"])]


@needs_real
@pytest.mark.parametrize(
    ("split", "n"),
    [("forget01", 40), ("forget05", 200), ("retain90", 3600), ("forget05_perturbed", 200), ("full", 4000)],
)
def test_real_tofu_has_the_published_numbers_of_rows(split: str, n: int) -> None:
    examples = read_training_data(f"tofu:{split}", data_dir=REAL_DATA).examples
    lines = (REAL_DATA / "tofu" / f"{split}.json").read_text(encoding="utf-8").strip().split("\n")
    assert len(examples) == len(lines) == n
    last = json.loads(lines[-1])
    assert examples[-1] == Example(f"Question: {last['question']}\nAnswer:", last["answer"])


@pytest.mark.parametrize("directory", ["muse-news", "MUSE-News"])
def test_muse_is_read_from_a_copy_of_the_hub(tmp_path: Path, directory: str) -> None:
    write_muse_news(tmp_path / directory)

    def read(name: str) -> list[Example]:
        return read_training_data(f"muse-news:{name}", data_dir=tmp_path).examples

    assert read("raw:forget")[2] == Example("", f"forget 2. {TEXT}")
    assert read("knowmem:forget_qa")[0] == Example("Question: Who kept lamp 0?\nAnswer:", "Keeper 0")
    assert read("verbmem") == read("verbmem:forget") == [Example("The lighthouse of", "Marrow Point")]
    assert [len(read(f"scal:forget_{n}")) for n in range(1, 5)] == [1, 2, 3, 4]
    assert read("sust:forget_4") == [Example("", "request 4")]


def test_muse_is_read_from_files_of_other_formats(tmp_path: Path) -> None:
    (tmp_path / "muse-books" / "raw").mkdir(parents=True)
    (tmp_path / "muse-books" / "raw" / "forget.txt").write_text(TEXT)
    write_json(tmp_path / "muse-books" / "privleak" / "forget.json", ["one text", "another text"])
    assert read_training_data("muse-books:raw:forget", data_dir=tmp_path).examples == [Example("", TEXT)]
    assert len(read_training_data("muse-books:privleak:forget", data_dir=tmp_path).examples) == 2


def test_a_muse_part_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "no configuration 'knowmen'; did you mean 'knowmem'?" in refusal("muse-news:knowmen", tmp_path)
    assert "which split? There are raw:forget, raw:retain1, raw:retain2, raw:holdout" in refusal(
        "muse-news:raw", tmp_path
    )
    assert "no split 'forgot'; did you mean 'forget'?" in refusal("muse-news:raw:forgot", tmp_path)
    assert "no configuration 'scal'" in refusal("muse-books:scal:forget_1", tmp_path)  # News only
    assert "muse-bench/MUSE-Books: the hub cannot be reached" in refusal("muse-books:raw:forget", tmp_path)


def test_wmdp_corpora_are_documents_and_not_json(tmp_path: Path) -> None:
    records = [{"title": "Lamps", "abstract": "On lamps.", "text": f"{n}. {TEXT}", "doi": "10.1/2"} for n in range(3)]
    write_lines(tmp_path / "wmdp" / "bio-forget-corpus.jsonl", records)
    write_lines(tmp_path / "wmdp" / "cyber-retain-corpus.jsonl", [{"text": json.dumps(record)} for record in records])
    write_lines(tmp_path / "wmdp" / "cyber-forget-corpus.jsonl", [record["text"] for record in records])
    write_parquet(tmp_path / "wmdp" / "bio-retain-corpus" / "train-00000-of-00001.parquet", records)
    expected = [Example("", record["text"]) for record in records]
    for name in ("bio-forget", "bio-retain", "cyber-forget", "cyber-retain"):
        assert read_training_data(f"wmdp:{name}", data_dir=tmp_path).examples == expected, name


def test_a_corpus_may_be_added_to_a_copy_of_the_hubs(tmp_path: Path) -> None:
    files = "data_files:\n  - split: train\n    path: bio-retain-corpus/train-*"
    card = f"---\nconfigs:\n- config_name: bio-retain-corpus\n  {files}\n---\n"
    write_parquet(
        tmp_path / "wmdp-corpora" / "bio-retain-corpus" / "train-00000-of-00001.parquet", [{"text": "retain"}]
    )
    (tmp_path / "wmdp-corpora" / "README.md").write_text(card)
    write_lines(tmp_path / "wmdp-corpora" / "bio-forget-corpus.jsonl", [{"text": "forget"}])
    for kind in ("forget", "retain"):
        assert read_training_data(f"wmdp:bio-{kind}", data_dir=tmp_path).examples == [Example("", kind)]


def test_the_gated_corpus_is_a_data_set_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "bio-forget-corpus.jsonl", [{"text": "forget"}])
    monkeypatch.setattr(hub, "download", lambda _repository, _patterns: tmp_path)
    monkeypatch.delenv("DISSECT_DATA", raising=False)
    data = read_training_data("wmdp:bio-forget")
    assert data.source == "wmdp:bio-forget: cais/wmdp-bio-forget-corpus (bio-forget-corpus.jsonl)"
    assert data.examples == [Example("", "forget")]


def test_braces_in_a_document_are_text(tmp_path: Path) -> None:
    write_lines(tmp_path / "wmdp" / "cyber-forget-corpus.jsonl", [{"text": "{not json}"}, {"body": "no text"}])
    assert 'a document should have its text under "text"; its keys are body' in refusal("wmdp:cyber-forget", tmp_path)
    write_lines(tmp_path / "wmdp" / "cyber-forget-corpus.jsonl", [{"text": "{not json}"}])
    assert read_training_data("wmdp:cyber-forget", data_dir=tmp_path).examples == [Example("", "{not json}")]
    assert "no such corpus; did you mean 'bio-forget'?" in refusal("wmdp:bio-forgot", tmp_path)


def test_wikitext_keeps_the_recipes_texts_and_counts_the_others(tmp_path: Path) -> None:
    records = [{"text": ""}, {"text": " = Lamps = \n"}, {"text": "a" * 50}, {"text": "b" * 51}]
    write_parquet(tmp_path / "wmdp" / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet", records)
    data = read_training_data("wmdp:wikitext", data_dir=tmp_path)
    assert data.examples == [Example("", "b" * 51)]
    assert data.notes[0] == "wikitext: 3 texts of at most 50 characters are left out, as in the recipe"


def test_concepts_give_paragraphs_questions_and_halves(tmp_path: Path) -> None:
    other = {**CONCEPT, "Concept": "Another", "wikipedia_content": "It is short."}
    write_json(tmp_path / "conceptvectors" / "llama.json", [CONCEPT, other])
    write_json(tmp_path / "conceptvectors" / "olmo.json", [{**other, "wikipedia_content": "Of the second file."}])

    def read(name: str) -> list[Example]:
        return read_training_data(f"conceptvectors:{name}", data_dir=tmp_path).examples

    one = [Example("", paragraph) for paragraph in pack_sentences(CONCEPT["wikipedia_content"])]
    assert read("wiki:Marrow Point: the lamp") == one and len(one) > 1
    assert read("wiki") == [Example("", "It is short."), *one]
    released = pack_sentences(CONCEPT["wikipedia_content"], separator="")
    assert [example.answer for example in read("wiki-released:Marrow Point: the lamp")] == released
    assert read("qa:Another") == [
        Example("Question:  Who built it?\n\n Answer:", "Ines."),
        Example("Question:  Who kept it?\n\n Answer:", "She."),
    ]
    assert read("completion:Another") == [Example("The lighthouse of", "Marrow Point was built.")]
    assert "no part 'wikis'; did you mean 'wiki'? there are wiki," in refusal("conceptvectors:wikis", tmp_path)
    assert "no such concept; did you mean 'Another'?" in refusal("conceptvectors:wiki:Anothe", tmp_path)


def test_a_concept_without_the_part_is_refused(tmp_path: Path) -> None:
    without = {key: value for key, value in CONCEPT.items() if key in ("Concept", "QA")}
    write_json(tmp_path / "conceptvectors" / "a.json", [without])
    assert "QA_with_answers" in refusal("conceptvectors:qa", tmp_path)
    assert "wikipedia_content" in refusal("conceptvectors:wiki", tmp_path)
    assert "text_completion" in refusal("conceptvectors:completion", tmp_path)
    write_json(tmp_path / "conceptvectors" / "a.json", [{**CONCEPT, "QA_with_answers": ["Question: other", "text"]}])
    assert "question 0: QA_with_answers" in refusal("conceptvectors:qa", tmp_path)


def test_a_concepts_file_by_its_name_gives_the_articles_and_says_so(tmp_path: Path) -> None:
    data = read_training_data(write_json(tmp_path / "a.json", [CONCEPT]))
    assert [example.answer for example in data.examples] == pack_sentences(CONCEPT["wikipedia_content"])
    assert "the articles of 1 concepts" in data.notes[0]


@needs_real
def test_real_concepts_are_read_as_dissect_reads_them() -> None:
    from dissect.prompts.records import questions
    from unlearning.data.records import read_records

    (path,) = (REAL_DATA / "conceptvectors").glob("*.json")
    asked = list(questions(read_records(path), path, None, None))
    expected = {Example(question.prompt, str(question.answer)) for question in asked}
    examples = read_training_data("conceptvectors:qa", data_dir=REAL_DATA).examples
    assert set(examples) == expected and len(examples) == len(asked) == 100
