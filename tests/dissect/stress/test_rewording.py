import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dissect import InputError
from dissect.stress.core.scores import score_facts
from dissect.stress.core.validity import invalid_variants
from dissect.stress.rewording import TEMPLATES, given_prefix, paraphrases_of, question_of, reminders_of, rewording
from tests.dissect.stress.constructed import case_of, model, questions

N = 6


def _mute_to(base, opening):
    """A model that knows nothing of texts that begin as `opening` does: all tokens are equally likely to it."""
    hf = copy.deepcopy(base.hf)
    tokens = torch.tensor(base.tokenizer(opening)["input_ids"])
    mute = {}

    def note(_module, _args, kwargs):
        mute["rows"] = (kwargs["input_ids"][:, : len(tokens)] == tokens).all(-1)

    def hush(_module, _args, logits):
        return torch.where(mute["rows"][:, None, None], 0.0, logits)

    hf.register_forward_pre_hook(note, with_kwargs=True)
    hf.get_output_embeddings().register_forward_hook(hush)
    return replace(base, name="mute", hf=hf, sha256="mute")


def _values(result, role, variant, measure="rank"):
    frame = result.frame
    here = frame[(frame["role"] == role) & (frame["variant"] == variant) & (frame["measure"] == measure)]
    return here.sort_values("example_index")["value"].to_numpy()


@pytest.mark.parametrize("name", ["demo:base", pytest.param("demo-neox:base", marks=pytest.mark.slow)])
def test_another_template_finds_what_one_opening_shuts_off(name):
    case = case_of(_mute_to(model(name), "Question:"), base=name).at_most(N)
    result = rewording(case, paraphrases=questions("forget_paraphrased"), reminders=1)
    for variant in ("", "paraphrase 1", "1 reminders", "1 own reminders"):
        np.testing.assert_array_equal(_values(result, "unlearned", variant), 0.5)
    for template in TEMPLATES:
        ours, base = (_values(result, role, f"template {template}", "logprob") for role in ("unlearned", "base"))
        np.testing.assert_allclose(ours, base, atol=1e-5)
    means = result.frame[result.frame["measure"] == "rank"].groupby(["role", "variant"])["value"].mean()
    ours = max(means["base", f"template {template}"] for template in TEMPLATES)
    theirs = means["control"].drop(list(invalid_variants(result))).max()
    expected = (ours - theirs) / (means["base", ""] - means["control", ""])
    assert result.residual().variant.startswith("template")
    assert result.residual().rho == pytest.approx(expected) and expected > 0


def test_never_as_unlearned_is_exactly_zero():
    result = rewording(case_of(model("demo:never")).at_most(4), reminders=1)
    for measure in ("rank", "logprob"):
        found = result.residual(measure)
        assert found.rho == found.low == found.high == 0


def test_a_model_that_never_knew_ranks_the_answer_in_the_middle_whatever_the_prompt():
    case = case_of(model("demo:npo")).at_most(60)
    asked = [given_prefix(both, 1) for both in zip(case.forget.prompts.items, case.forget.distractors, strict=True)]
    some = [one for one in asked if one is not None]
    facts = replace(
        case.forget,
        prompts=replace(case.forget.prompts, items=tuple(item for item, _ in some)),
        distractors=tuple(wrong for _, wrong in some),
    )
    rank = score_facts(case.control, facts).rank
    assert len(rank) > 40
    assert abs(rank.mean() - 0.5) < 3 * 0.35 / len(rank) ** 0.5  # ties make ranks' deviation larger than 1/sqrt(12)


def test_a_prefix_is_given_and_only_the_rest_scored():
    case = case_of(model("demo:npo"))
    by_length = {item.n_answer_tokens: place for place, item in enumerate(case.forget.prompts.items)}
    case = replace(case, forget=case.forget.select([by_length[n] for n in (1, 2, 3, 4)]))
    result = rewording(case, reminders=0, prefixes=[1, 2], templates={})
    found = {n: _values(result, "base", f"prefix of {n} token{'s' if n > 1 else ''}", "logprob") for n in (1, 2)}
    ranks = _values(result, "base", "prefix of 1 token")
    for place, (item, wrong) in enumerate(zip(case.forget.prompts.items, case.forget.distractors, strict=True)):

        def rest(one, n):
            with torch.inference_mode():
                logprobs = case.pair.base.hf(input_ids=torch.tensor([one.input_ids])).logits[0].log_softmax(-1)
            at = range(one.answer_start - 1 + n, len(one.input_ids) - 1)
            return np.mean([float(logprobs[position, one.input_ids[position + 1]]) for position in at])

        for n in (1, 2):
            if item.n_answer_tokens <= n:
                assert np.isnan(found[n][place])
            else:
                assert found[n][place] == pytest.approx(rest(item, n), abs=1e-4)
        if item.n_answer_tokens > 1:
            longer = [rest(one, 1) for one in wrong if one.n_answer_tokens > 1]
            assert ranks[place] == np.mean([rest(item, 1) > other for other in longer])
    assert any("prefix of 2 tokens: not possible for" in note for note in result.notes)


def test_reminders_give_no_answer_away_and_are_of_the_right_people():
    case = case_of(model("demo:npo")).at_most(30)
    pool = questions("retain").items[:200]
    for asked in zip(case.forget.prompts.items, case.forget.distractors, strict=True):
        item, wrong = asked
        others = reminders_of(asked, pool, 3, own=False, seed=0)
        own = reminders_of(asked, questions("forget").items, 3, own=True, seed=0)
        assert len(others) == len(own) == 3
        assert {one.group for one in own} == {item.group} and item.group not in {one.group for one in others}
        for shot in (*others, *own):
            text = f"{shot.prompt} {shot.answer}".lower().split()
            for one in (item, *wrong):
                words = one.answer.lower().split()
                assert not any(text[at : at + len(words)] == words for at in range(len(text)))
            assert shot.prompt != item.prompt
        kind = item.id.partition("-")[2]
        assert {one.id.partition("-")[2] for one in others} == {kind}


def test_reminders_stand_in_front_as_text():
    case = case_of(model("demo:npo")).at_most(2)
    result = rewording(case, reminders=2, prefixes=[], templates={})
    item = case.forget.prompts.items[0]
    asked = (item, case.forget.distractors[0])
    shots = reminders_of(asked, case.retain.prompts.items, 2, own=False, seed=case.seed)
    text = "".join(f"{shot.prompt} {shot.answer}\n" for shot in shots) + f"{item.prompt} {item.answer}"
    ids = case.pair.tokenizer(text)["input_ids"]
    with torch.inference_mode():
        logprobs = case.pair.base.hf(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = np.mean([float(logprobs[at - 1, ids[at]]) for at in range(len(ids) - item.n_answer_tokens, len(ids))])
    assert _values(result, "base", "2 reminders", "logprob")[0] == pytest.approx(expected, abs=1e-4)


def test_every_fact_finds_its_paraphrases():
    facts, paraphrases = questions("forget").items, questions("forget_paraphrased").items
    found = paraphrases_of(facts, paraphrases)
    by_id = {item.id: item for item in facts}
    assert sorted(found) == sorted(by_id) and all(len(texts) == 2 for texts in found.values())
    for one in paraphrases:
        assert one.prompt in found[one.id.rpartition("-")[0]]
    numbered = [replace(one, id=str(number)) for number, one in enumerate(paraphrases)]
    assert paraphrases_of(facts, numbered) == found  # by group and answer


def test_paraphrases_with_another_answer_belong_to_nothing():
    facts, paraphrases = questions("forget").items[:6], questions("forget_paraphrased").items[:12]
    assert paraphrases_of(facts, [replace(one, answer="something else") for one in paraphrases]) == {}


@settings(max_examples=40)
@given(st.text(min_size=1), st.text(), st.text())
def test_a_question_is_found_in_its_wrapping(question, before, after):
    wrapping = before.replace("{", "") + "{question}" + after.replace("{", "")
    assert question_of(wrapping.replace("{question}", question), wrapping) == question


def test_prompts_that_are_wrapped_otherwise_have_no_other_template():
    result = rewording(case_of(model("demo:npo")).at_most(3), reminders=0, wrapping="Frage: {question}")
    assert "template bare: not possible for any of the facts" in result.notes
    assert set(result.frame["variant"]) == {"", "prefix of 1 token"}


def test_bad_input():
    case = case_of(model("demo:npo")).at_most(3)
    with pytest.raises(InputError, match="question} once"):
        rewording(case, templates={"none": "What?"})
    with pytest.raises(InputError, match="prefixes.*0"):
        rewording(case, prefixes=[0])
    with pytest.raises(InputError, match="paraphrases.*forget facts"):
        rewording(case, paraphrases=questions("retain"))
    with pytest.raises(InputError, match="no wording is possible for any"):
        rewording(case, reminders=0, prefixes=[], templates={})
