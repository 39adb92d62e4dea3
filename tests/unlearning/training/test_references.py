"""The reference model's quantities: from disk and from a kept copy the same, and never another model's."""

import gc
import os
import shutil
import tracemalloc
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.unlearning.helpers import build_examples, build_tiny_llama
from unlearning import InputError, train
from unlearning.common.cache import cache_directory, list_cache, older_than
from unlearning.data.batches import TokenBatch, collate, inserted
from unlearning.data.encoding import encode
from unlearning.data.order import StepSampler
from unlearning.data.spans import AnswerSpan
from unlearning.methods.method import Reference
from unlearning.training import references as reference_module
from unlearning.training.references import LiveColumn, References, ReferenceSettings, StoredColumn, compute_references
from unlearning.training.training_set import TrainingSet

ALL = (Reference("retain", "nll"), Reference("retain", "logits"), Reference("retain", "hidden", 1))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNLEARNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


@pytest.fixture
def spans(tokenizer: PreTrainedTokenizerFast) -> list[AnswerSpan]:
    return encode(tokenizer, build_examples(), append_eos=True, max_length=None).spans


def computed(
    spans: list[AnswerSpan],
    *,
    model: torch.nn.Module | None = None,
    name: str = "start",
    budget: float = 1.0,
    size=3,
    read=None,
    asked=ALL,
) -> References:
    return compute_references(
        model if model is not None else build_tiny_llama(),
        name,
        {"retain": spans},
        {"retain": range(len(spans)) if read is None else read},
        asked,
        ReferenceSettings(
            batch_size=size,
            budget=budget,
            precision="float32",
            main_first=nullcontext,
            advance=lambda _done, _total: None,
            load=lambda _name: build_tiny_llama(2),
            put_before=lambda text, span: inserted(span, [*text.encode()], 0),
        ),
    )


def attached(references: References, spans: list[AnswerSpan], places: list[int]) -> TokenBatch:
    return references.attach("retain", places, collate([spans[place] for place in places]))


def slow(span: AnswerSpan) -> tuple[float, torch.Tensor, torch.Tensor]:
    """One unpadded pass: summed loss, logits that predict the answer, and block 1's output, from all hidden states."""
    with torch.no_grad():
        model = build_tiny_llama()
        ids = torch.tensor([span.input_ids])
        output = model(ids)
        caught = []
        handle = model.model.layers[1].register_forward_hook(lambda _m, _i, out: caught.append(out))
        model(ids)
        handle.remove()
    logits = output.logits[0, span.answer_start - 1 : -1]
    nll = sum(
        -row.log_softmax(-1)[token] for row, token in zip(logits, span.input_ids[span.answer_start :], strict=True)
    )
    hidden = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
    return float(nll), logits, hidden[0] if hidden.ndim == 3 else hidden


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("budget", [1.0, 0.0], ids=["on disk", "model kept"])
def test_constants_equal_one_unpadded_pass(spans: list[AnswerSpan], size: int, budget: float) -> None:
    references = computed(spans, budget=budget, size=size)
    kinds = [type(column) for column in references.columns.values()]
    assert kinds == ([StoredColumn] * 3 if budget else [StoredColumn, LiveColumn, LiveColumn])
    for places in ([0, 1, 2], [6, 2, 4, 4]):
        batch = attached(references, spans, places)
        expected = [slow(spans[place]) for place in places]
        assert batch.reference_nll is not None and batch.reference_nll.tolist() == pytest.approx(
            [nll for nll, _, _ in expected], abs=1e-4
        )
        for found, part in ((batch.reference_logits, 1), (batch.reference_hidden, 2)):
            assert found is not None
            torch.testing.assert_close(found, torch.cat([row[part] for row in expected]), atol=1e-5, rtol=0)
    assert attached(references, spans, [0]).to(torch.device("cpu")).reference_logits is not None
    assert references.attach("forget", [0], collate(spans[:1])).reference_nll is None


@pytest.mark.parametrize("budget", [1.0, 0.0], ids=["on disk", "model kept"])
def test_a_named_model_beside_the_start(spans: list[AnswerSpan], budget: float) -> None:
    own, named = Reference("retain", "logits"), Reference("retain", "logits", model="another")
    columns = computed(spans, budget=budget, asked=(own, named)).columns
    for reference, model in ((own, build_tiny_llama()), (named, build_tiny_llama(2))):
        found = References({reference: columns[reference]}).attach("retain", [2], collate([spans[2]]))
        with torch.no_grad():
            logits = model(torch.tensor([spans[2].input_ids])).logits[0, spans[2].answer_start - 1 : -1]
        assert found.reference_logits is not None
        torch.testing.assert_close(found.reference_logits, logits, atol=1e-5, rtol=0)
    if budget:
        assert {entry.model for entry in list_cache()} == {"", "another"}


@pytest.mark.parametrize("budget", [1.0, 0.0], ids=["on disk", "model kept"])
def test_logits_after_texts_are_added_up(spans: list[AnswerSpan], budget: float, cache: Path) -> None:
    asked = [
        Reference("retain", "logits", prefixes=prefixes)
        for prefixes in ((("", 1.0), ("ab", 2.0), ("c", -0.5)), (("", 1.0), ("ab", 2.0), ("d", -0.5)), (("ab", 2.0),))
    ]
    asked.append(Reference("retain", "logits", prefixes=(("ab", 1.0),)))
    columns = computed(spans, budget=budget, asked=asked).columns
    model, span = build_tiny_llama(), spans[2]
    for reference in asked:
        found = References({reference: columns[reference]}).attach("retain", [2], collate([span]))
        total = torch.zeros(())
        for text, weight in reference.prefixes:
            ids = [*text.encode(), *span.input_ids]
            with torch.no_grad():
                total = total + weight * model(torch.tensor([ids])).logits[0, len(text) + span.answer_start - 1 : -1]
        assert found.reference_logits is not None
        torch.testing.assert_close(found.reference_logits, total, atol=1e-4, rtol=0)
    assert len(list(cache.glob("*.npy"))) == (len(asked) if budget else 0)


def test_a_text_that_leaves_no_room_is_refused(spans: list[AnswerSpan]) -> None:
    asked = [Reference("retain", "logits", prefixes=(("a" * 120, 1.0),))]
    with pytest.raises(InputError, match=r"'a+' before the retain texts makes 1\d\d tokens, and the model reads 128"):
        computed(spans, asked=asked)


def test_the_kept_model_is_not_the_trained_one(spans: list[AnswerSpan]) -> None:
    model = build_tiny_llama()
    references = computed(spans, model=model, budget=0)
    before = attached(references, spans, [0, 1]).reference_logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    torch.testing.assert_close(attached(references, spans, [0, 1]).reference_logits, before, atol=0, rtol=0)


def test_constants_are_taken_without_dropout(spans: list[AnswerSpan]) -> None:
    model = build_tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    batch = attached(computed(spans, model=model), spans, [0])
    assert batch.reference_nll is not None
    assert batch.reference_nll.item() == pytest.approx(slow(spans[0])[0], abs=1e-4)
    assert model.training


def test_what_is_on_disk_is_not_computed_again(spans: list[AnswerSpan], monkeypatch: pytest.MonkeyPatch) -> None:
    first = attached(computed(spans), spans, [3]).reference_logits

    def refuse(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(reference_module, "evaluate", refuse)
    torch.testing.assert_close(attached(computed(spans), spans, [3]).reference_logits, first, atol=0, rtol=0)
    for changed in ({"name": "another model"}, {"spans": [replace(spans[0], answer_start=3), *spans[1:]]}):
        with pytest.raises(AssertionError, match="computed again"):
            computed(**{"spans": spans, **changed})


@pytest.mark.parametrize("budget", [1.0, 0.0], ids=["on disk", "model kept"])
def test_of_the_examples_that_are_not_read_nothing_is_computed(
    spans: list[AnswerSpan], budget: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed_rows: list[int] = []
    real = reference_module.evaluate

    def counted(model: torch.nn.Module, batch: TokenBatch, *rest: object) -> torch.Tensor:
        computed_rows.append(len(batch.input_ids))
        return real(model, batch, *rest)

    monkeypatch.setattr(reference_module, "evaluate", counted)
    references = computed(spans, read=[1, 4, 6], budget=budget)
    assert sum(computed_rows) == 3 * (3 if budget else 1)  # nll is on disk with any budget
    some, whole = attached(references, spans, [6, 1]), attached(computed(spans), spans, [6, 1])
    for name in ("nll", "logits", "hidden"):
        found, wanted = (getattr(batch, f"reference_{name}") for batch in (some, whole))
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    with pytest.raises(AssertionError, match="not to read"):
        attached(references, spans, [0])


def test_a_run_computes_constants_of_the_rows_that_it_reads_and_of_no_others(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four forget rows and two thousand retain rows: few steps read few retain rows."""
    forget, shown = build_examples()[:4], build_examples()[4:]
    retain = [replace(shown[place % 4], prompt=f"{place} {shown[place % 4].prompt}") for place in range(2000)]
    counted: dict[str, int] = {}
    read: dict[str, set[int]] = {"forget": set(), "retain": set()}
    evaluate, attach = reference_module.evaluate, References.attach

    def counting(model: torch.nn.Module, batch: TokenBatch, reference: Reference, precision: str) -> torch.Tensor:
        counted[reference.data] = counted.get(reference.data, 0) + len(batch.input_ids)
        return evaluate(model, batch, reference, precision)

    def noting(self: References, data: str, indices: list[int], batch: TokenBatch) -> TokenBatch:
        read[data].update(indices)
        return attach(self, data, indices, batch)

    monkeypatch.setattr(reference_module, "evaluate", counting)
    monkeypatch.setattr(References, "attach", noting)
    settings = {"batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 5, "seed": 3, "eval_examples": 2}
    train(
        "npo",
        model=build_tiny_llama(),
        tokenizer=tokenizer,
        forget=forget,
        retain=retain,
        retain_loss="kl",
        progress=False,
        **settings,
    )
    assert counted == {name: len(indices) for name, indices in read.items()}
    assert counted["retain"] == 10 <= 2000 / 50


@given(
    n_forget=st.integers(0, 7),
    n_retain=st.integers(1, 30),
    alternates=st.integers(0, 2),
    steps=st.integers(1, 30),
    size=st.integers(1, 9),
    batch=st.integers(1, 4),
    world=st.integers(1, 3),
)
def test_the_rows_known_beforehand_are_those_of_all_processes(
    n_forget: int, n_retain: int, alternates: int, steps: int, size: int, batch: int, world: int
) -> None:
    """Against the plans of every process, epoch by epoch."""
    some = [AnswerSpan([1] * (2 + place % 3), 1) for place in range(40)]
    pairs = [(index, place if alternates else -1) for index in range(n_forget) for place in range(alternates or 1)]
    data = TrainingSet(some[:n_forget], some[:alternates], some[:n_retain], pairs, References({}))
    forget, alternate, retain = set(), set(), set()
    for rank in range(world):
        sampler = StepSampler(
            data.main_lengths(),
            data.retain_lengths(),
            seed=5,
            batch_size=batch,
            step_batch_size=size,
            rank=rank,
            world=world,
        )
        done = epoch = 0
        while done < steps:
            sampler.set_epoch(epoch)
            for plan in sampler:
                if done < steps:
                    for items in plan.main_batches:
                        forget |= {pairs[item][0] for item in items if pairs}
                        alternate |= {pairs[item][1] for item in items if pairs}
                        retain |= set() if pairs else set(items)
                    retain |= {index for items in plan.retain_batches for index in items}
                done += 1
            epoch += 1
    found = data.read(seed=5, step_batch_size=size, n_steps=steps)
    assert found == {"forget": sorted(forget), "alternate": sorted(alternate - {-1}), "retain": sorted(retain)}


def test_a_file_that_is_cut_short_is_computed_again(spans: list[AnswerSpan], cache: Path) -> None:
    first = attached(computed(spans), spans, [3]).reference_logits
    files = sorted(cache.glob("*.npy"))
    assert len(files) == 3
    for file in files:
        file.write_bytes(file.read_bytes()[:-100])
    torch.testing.assert_close(attached(computed(spans), spans, [3]).reference_logits, first, atol=0, rtol=0)
    assert [np.load(file).nbytes > 0 for file in sorted(cache.glob("*.npy"))] == [True] * 3


def test_a_full_disk_is_one_line_and_leaves_nothing(
    spans: list[AnswerSpan], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_2_0", full)
    with pytest.raises(InputError, match="no space left for .* GB .* nll.*UNLEARNING_CACHE.*`reference_budget`"):
        computed(spans)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_done_without(spans: list[AnswerSpan], cache: Path) -> None:
    first = attached(computed(spans), spans, [3, 1])
    shutil.rmtree(cache)
    cache.write_text("a file where the directory should be")
    with pytest.warns(UserWarning, match="reference: cannot be written: .*; a copy of the model.*UNLEARNING_CACHE"):
        references = computed(spans)
    assert {type(column) for column in references.columns.values()} == {LiveColumn}
    found = attached(references, spans, [3, 1])
    for name in ("nll", "logits", "hidden"):
        wanted = getattr(first, f"reference_{name}")
        torch.testing.assert_close(getattr(found, f"reference_{name}"), wanted, atol=1e-4, rtol=0)
    assert cache.read_text().startswith("a file")


def test_a_cache_that_may_only_be_read_is_read(spans: list[AnswerSpan], monkeypatch: pytest.MonkeyPatch) -> None:
    first = attached(computed(spans), spans, [3]).reference_logits

    def refused(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "utime", refused)
    monkeypatch.setattr(reference_module, "_write", refused)
    torch.testing.assert_close(attached(computed(spans), spans, [3]).reference_logits, first, atol=0, rtol=0)


def test_what_a_run_reads_is_not_removed_for_another(
    spans: list[AnswerSpan], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit below two runs' files: those of the run that is over go, those of the one that trains stay."""
    over = computed(spans, name="over")
    size = sum(entry.size for entry in list_cache())
    monkeypatch.setenv("UNLEARNING_CACHE_GB", str(1.5 * size / 1e9))
    training = computed(spans, name="training")
    assert {path.name for path in cache.glob("*.npy")} == names_of(over) | names_of(training)  # both are read still
    kept = names_of(training)
    del over
    gc.collect()
    third = computed(spans, name="third")
    assert {path.name for path in cache.glob("*.npy")} == kept | names_of(third)
    assert len(list(cache.iterdir())) == 12
    assert attached(training, spans, [3]).reference_logits is not None
    monkeypatch.setenv("UNLEARNING_CACHE_GB", "0")
    assert {type(column) for column in computed(spans, name="fourth").columns.values()} == {StoredColumn, LiveColumn}


def names_of(references: References) -> set[str]:
    return {column.path.name for column in references.columns.values() if isinstance(column, StoredColumn)}


def test_what_is_read_again_is_used(spans: list[AnswerSpan], cache: Path) -> None:
    computed(spans)
    for path in cache.iterdir():
        os.utime(path, (1e9, 1e9))
    assert len(older_than(list_cache(), 30)) == 3
    computed(spans)
    assert not older_than(list_cache(), 30)


def test_the_cache_is_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_directory("reference") == tmp_path / "cache" / "reference"
    monkeypatch.delenv("UNLEARNING_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory("reference") == tmp_path / "xdg" / "unlearning" / "reference"


def test_rows_are_read_into_their_place_and_stand_in_memory_once(tmp_path: Path) -> None:
    """The logits of a batch are among the largest tensors of a step."""
    rows = np.arange(200 * 500, dtype="<f4").reshape(200, 500)
    rows.tofile(tmp_path / "rows")
    descriptor = os.open(tmp_path / "rows", os.O_RDONLY)
    column = StoredColumn(tmp_path / "rows", descriptor, 0, 500, np.array([0, 50, 100, 100, 200]))
    tracemalloc.start()
    try:
        found = column.of([3, 1], collate([AnswerSpan([1, 2], 1)]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(found.numpy(), np.concatenate([rows[100:200], rows[50:100]]))
    assert peak < 1.1 * found.numel() * 4
