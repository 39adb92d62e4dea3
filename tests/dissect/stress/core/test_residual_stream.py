import numpy as np
import pytest
import torch

from dissect.models.anatomy import block_of
from dissect.models.model import Model
from dissect.scoring.forward import scored_logits
from dissect.stress.core.edits import outputs_edited
from dissect.stress.core.residual_stream import (
    even_batches,
    head_logits,
    mean_logprobs,
    patched_logits,
    residual_stream,
    states_at,
)
from dissect.stress.core.scores import score_answers
from tests.dissect.families import build, hooked, inputs_of
from tests.dissect.helpers import build_prompts, build_tokenizer
from tests.dissect.stress.constructed import model, questions

NAMES = ["demo:base", "demo-neox:base"]


@pytest.fixture(scope="module")
def prompts():
    found = questions("forget")
    return type(found)(found.items[:240:24], found.scoring, found.pad_token_id, found.source)


def _slow_states(of, item):
    """What every block hands on, for one text alone, by transformers' own forward with one hook."""
    found = []
    blocks = [block_of(of.hf, of.anatomy, layer).whole for layer in range(of.n_layers)]
    handles = [
        block.register_forward_hook(lambda _m, _a, out: found.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks
    ]
    with torch.inference_mode():
        of.hf(input_ids=torch.tensor([item.input_ids]))
    for handle in handles:
        handle.remove()
    return torch.stack(found)[:, 0, list(item.scored)]


@pytest.mark.parametrize("name", NAMES)
def test_states_are_those_of_one_text_at_a_time(name, prompts):
    of = model(name)
    states = states_at(of, prompts, prompts.items, batch_size=4)
    slow = torch.cat([_slow_states(of, item) for item in prompts.items], dim=1)
    torch.testing.assert_close(states[1:], slow, atol=2e-4, rtol=1e-4)
    embedded = [of.hf.get_input_embeddings().weight[list(item.input_ids)][list(item.scored)] for item in prompts.items]
    torch.testing.assert_close(states[0], torch.cat(embedded).detach())


@pytest.mark.parametrize("name", NAMES)
def test_the_last_place_through_the_own_head_is_the_output(name, prompts):
    of = model(name)
    for _, batch in even_batches(prompts, prompts.items, 4):
        stream = residual_stream(of, batch)
        torch.testing.assert_close(stream.logits(of.n_layers, of), scored_logits(of, batch), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_own_states_change_nothing_at_any_layer(name, prompts):
    of = model(name)
    for _, batch in even_batches(prompts, prompts.items, 4):
        states = residual_stream(of, batch).states[1:]
        own, patched = patched_logits(of, batch, states)
        torch.testing.assert_close(own, scored_logits(of, batch), atol=1e-4, rtol=1e-4)
        for logits in patched:
            torch.testing.assert_close(logits, own, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_patched_logits_are_those_of_one_hooked_forward_per_layer(name, prompts):
    of = model(name)
    (batch,) = prompts.batches(len(prompts), padding_side="left")
    states = torch.randn(of.n_layers, len(batch.rows), of.hf.config.hidden_size, generator=torch.manual_seed(0))
    _, patched = patched_logits(of, batch, states)
    for layer, logits in enumerate(patched):

        def put(_module, _args, output, layer=layer):
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[batch.rows, batch.columns] = states[layer]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = block_of(of.hf, of.anatomy, layer).whole.register_forward_hook(put)
        expected = scored_logits(of, batch)
        handle.remove()
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_mean_logprobs_are_those_of_the_scores(prompts):
    of = model("demo:base")
    expected = score_answers(of, prompts, prompts.items)[0]
    for places, batch in even_batches(prompts, prompts.items, 3):
        np.testing.assert_allclose(mean_logprobs(scored_logits(of, batch), batch), expected[places], atol=1e-5)


def test_a_gradient_goes_through_the_head():
    of = model("demo:base")
    states = torch.randn(3, of.hf.config.hidden_size, generator=torch.manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(head_logits(of, states, as_tuple=False).square().sum(), states)
    assert gradient.abs().max() > 0


def test_no_hook_stays(prompts):
    of = model("demo:base")
    (batch,) = prompts.batches(4)[:1]
    before = [dict(module._forward_hooks) | dict(module._forward_pre_hooks) for module in of.hf.modules()]
    list(patched_logits(of, batch, residual_stream(of, batch).states[1:])[1])
    assert before == [dict(module._forward_hooks) | dict(module._forward_pre_hooks) for module in of.hf.modules()]


def test_blocks_that_return_lists_are_read_and_edited_as_others(tmp_path):
    """As those of the first GPT do."""
    of = Model.wrap(build("the first gpt"), build_tokenizer(), name="mine")
    (batch,) = build_prompts(tmp_path).batches(8)
    stream, whole = residual_stream(of, batch), scored_logits(of, batch)
    with torch.no_grad():
        states = of.hf(**inputs_of(of, batch), output_hidden_states=True).hidden_states
    for layer, found in enumerate(stream.states):
        torch.testing.assert_close(found, states[layer][batch.rows, batch.columns], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stream.logits(of.n_layers, of), whole, atol=1e-4, rtol=1e-4)
    for logits in patched_logits(of, batch, stream.states[1:])[1]:  # a model's own states change nothing
        torch.testing.assert_close(logits, whole, atol=1e-4, rtol=1e-4)
    block = block_of(of.hf, of.anatomy, 1).whole
    with outputs_edited({block: lambda found: found + 1.0}):
        edited = scored_logits(of, batch)
    with hooked(of.hf, "resid_post", (1,), lambda _layer, found: found + 1.0):
        torch.testing.assert_close(edited, scored_logits(of, batch), atol=1e-5, rtol=1e-5)
    assert (edited - whole).abs().max() > 1e-3
