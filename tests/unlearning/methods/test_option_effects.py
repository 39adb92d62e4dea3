"""Every option of every method, beside every other: it changes what a step does, or it is refused, and never both."""

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.unlearning.helpers import build_examples
from tests.unlearning.methods.helpers import DATA, MODEL, START, losses_of
from unlearning import Example, InputError, train
from unlearning.methods import METHODS
from unlearning.methods.altpo import draw_alternates
from unlearning.methods.method import AnyMethod, check_weights
from unlearning.methods.stages import PreparationInputs, RunFacts
from unlearning.methods.whp import method as whp
from unlearning.objectives.combination import Bilevel, DualAscent, GradientCombination
from unlearning.objectives.displacement import Displacement
from unlearning.options import TrainOptions, resolve_options

FACTS = RunFacts(forget=DATA.forget, steps=8, batch_size=2)
NAMES = [name for name, _ in MODEL.named_parameters()]

# Values beside the default, where the type alone does not tell one.
OTHER: dict[str, Any] = {
    "alternate_template": "{prompt}",
    "massive_ratio": 1.01,
    "steering_coefficient": 6.5,
    "dual_warmup_steps": 3,
    "layer": 1,
    "beta": 0.7,
    "alpha": 0.7,
    "anchors": "anchors.json",
    "background": "background.txt",
    "reinforced": "reinforced-model",
    "delta": 0.5,
    "attack_learning_rate": 0.001,
    "adversary_every": 2,
    "layers": "1",
    "salient": "down_proj",
    "salient_share": 0.2,
    "schedule_steps": 5,
    "folds": 2,
    "radius": 0.7,
    "control": "another control",
    "concept": "another concept",
    "novice": "Who knows nothing of {concept}:",
    "expert": "Who knows all of {concept}:",
    "reinforced_learning_rate": 0.3,
}
"""`layer` 0 is the default of a model of two blocks."""

# What else is set meanwhile, one at a time and in pairs.
BESIDE: dict[str, list[dict[str, Any]]] = {
    "blur": [
        *({"forget_loss": name} for name in ("ga", "rmu", "simnpo")),
        {"retain_loss": "hidden"},
        {"variant": "sum"},
        {"variant": "swapped"},
        {"steering_coefficient": 3.0},
    ],
    "pdu": [{"eta": 0.0}, {"dual_warmup_steps": 1}, {"gamma": 0.0}],
    "rmu": [{"gamma": 0.0}, {"alpha": 0.0}, {"steering_coefficient": 3.0}],
    "sam_npo": [{"smoothing": "noise"}, {"gamma": 0.0}, {"alpha": 0.0}, {"retain_loss": "kl"}],
    "circuit_breakers": [{"gamma": 0.0}, {"alpha": 0.0}, {"layers": "1"}, {"schedule_steps": 3}],
    "sure": [{"salient": "q_proj"}, {"gamma": 0.0}, {"alpha": 0.0}, {"retain_loss": "kl"}],
    "ilu": [{"invariance": 0.0}, {"gamma": 0.0}, {"alpha": 1.0}, {"retain_loss": "kl"}],
    "lat": [{"radius": 0.5}, {"layer": 1}, {"gamma": 0.0}, {"alpha": 0.0}, {"retain_loss": "kl"}],
    "oracle": [{"control": "another"}, {"gamma": 0.0}, {"alpha": 0.0}, {"wrong_answers": True}],
    "elm": [{"concept": "towns"}, {"eta": 2.0}, {"alpha": 0.0}, {"retain_loss": "nll"}],
    "undo": [{"noise": 0.0}, {"noise_scale": 0.0}, {"noise": 1.0}, {"gamma": 0.0}, {"alpha": 0.0}],
    "mudman": [{"alpha": 3.0}, {"retain_momentum": 0.0}, {"adversary_every": 1}, {"trained_maps": "inputs"}],
    "tar": [{"forget_loss": "npo"}, {"gamma": 0.0}, {"alpha": 0.0}, {"retain_loss": "kl"}],
    "whp": [{"anchors": "given.json"}, {"reinforced": "given"}, {"reinforced_weight": 0.0}],
}
REQUIRED = {"oracle": {"control": "a control"}, "elm": {"concept": "a concept"}}
WEIGHTS: list[dict[str, Any]] = [{"gamma": 0.0}, {"alpha": 0.0}, {"alpha": 1.0}, {"retain_loss": "kl"}]


def contexts(method: AnyMethod, *, pairs: bool) -> Iterator[dict[str, Any]]:
    names = {field.name for field in dataclasses.fields(method.options)}
    needed = REQUIRED.get(method.name, {})
    single = [each for each in BESIDE.get(method.name, WEIGHTS) if names.issuperset(each)]
    if not pairs:
        yield needed
        yield from (needed | each for each in single)
        return
    for one, other in itertools.combinations(single, 2):
        if one.keys().isdisjoint(other):
            yield needed | one | other


def others(method: AnyMethod, name: str, default: Any) -> list[Any]:
    """Values that differ from the default, all of an option with a few."""
    hint = get_type_hints(method.options)[name]
    if name in OTHER:
        return [OTHER[name]]
    if get_origin(hint) is Literal:
        return [choice for choice in get_args(hint) if choice != default]
    if isinstance(default, bool):
        return [not default]
    return [default + 1 if isinstance(default, int) else default * 0.5 + 0.11]


def gradient(loss: Tensor | None, model: LlamaForCausalLM = MODEL) -> list[Tensor]:
    if loss is None:
        return [torch.zeros_like(parameter) for parameter in model.parameters()]
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), found, strict=True)]


def started(method: AnyMethod, options: Any) -> LlamaForCausalLM:
    """The model before the first step."""
    model = copy.deepcopy(MODEL)
    if method.start is not None:
        with torch.no_grad():
            method.start(list(model.named_parameters()), options)
    return model


def moved(
    method: AnyMethod, options: Any, displacement: Displacement | None, step: int, start: LlamaForCausalLM
) -> LlamaForCausalLM:
    """The model at the weights where the forget gradient of a step is taken."""
    model = copy.deepcopy(start)
    if displacement is not None:

        def slopes(loss: Any) -> list[Tensor]:
            attacking = method if loss is None else replace(method, forget_loss=loss)
            with torch.enable_grad():
                return gradient(losses_of(attacking, options, DATA, model=model)[0], model)

        displacement.move(list(model.parameters()), slopes, step)
    return model


def done_in_a_step(method: AnyMethod, options: Any) -> list[Any]:
    """All that comes out of a step: the direction, the parameters, the multipliers, the last weights."""
    if method.resolve is not None:
        options = method.resolve(MODEL, options)
    if method.settle is not None:
        options = method.settle(MODEL, FACTS, options).options
    combination = method.combination(options)
    gamma, alpha = combination.weights()
    learned = []
    for retain_loss in (0.2, 1.0, 3.0, 0.1) if isinstance(combination, DualAscent) else ():
        combination.after_step(retain_loss)
        learned.append(combination.weights())
    # A loss without weight is not computed by the trainer.
    read = gamma or method.statistic_of == "retain"
    left_out = replace(
        method, forget_loss=method.forget_loss if gamma else None, statistic=method.statistic if read else None
    )
    start = started(method, options)
    displacement = method.displacement(options) if method.displacement is not None else None
    directions, pairs = [], []
    for step in range(4 if method.displacement is not None and gamma else 1):
        model = moved(left_out, options, displacement, step, start) if gamma else start
        f = gradient(losses_of(left_out, options, DATA, model=model)[0], model)
        r = gradient(losses_of(left_out, options, DATA, model=start)[1] if alpha else None, start)
        pairs.append((f, [(1, -0.7)[step % 2] * part for part in r]))  # so that an average may turn its sign
        directions.append([gamma * a + alpha * b for a, b in zip(f, r, strict=True)])
    if isinstance(combination, Bilevel):
        # What yields is also taken along the other gradient, where every clamp binds.
        along = [5 * part for part in (f if combination.first == "forget" else r)]
        bound = (f, along) if combination.first == "forget" else (along, r)
        pairs.append(bound)
    if isinstance(combination, GradientCombination):
        directions = [combined(combination, *pair) for pair in pairs]
    trained = method.trains(MODEL, options) if method.trains is not None else None
    end: list[float] = []
    if method.finish is not None:
        last = copy.deepcopy(MODEL)
        method.finish(last, START, options)
        end = [parameter.sum().item() for parameter in last.parameters()]
    every = torch.cat([part.flatten() for direction in directions for part in direction]) + 0.0  # no -0
    beside = {(reference.model, reference.prefixes) for reference in method.needs(options).references}
    return [every.numpy().tobytes(), trained, learned, end, beside]


def combined(combination: GradientCombination, f: list[Tensor], r: list[Tensor]) -> list[Tensor]:
    return list(combination.combine([part.clone() for part in f], [part.clone() for part in r], NAMES)[0])


def prepared_by_altpo(options: Any, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> Any:
    """What alternates are asked for."""
    asked: list[Any] = []

    def answers(_model: object, _tokenizer: object, prompts: list[str], **settings: Any) -> list[list[str]]:
        asked.append((prompts, {name: settings[name] for name in ("samples", "temperature", "max_new_tokens")}))
        return [["nothing"] for _ in prompts]

    monkeypatch.setattr("unlearning.methods.altpo.sampled_answers", answers)
    draw_alternates(preparation(tokenizer), options)
    return asked


def prepared_by_whp(options: Any, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> Any:
    """What the labels are made of: the anchors, the reinforced model, and the settings."""
    made: dict[str, Any] = {}

    def labels(
        _base: object, reinforced: Any, _tokenizer: object, _texts: object, anchors: Any, settings: Any, **_: Any
    ) -> Any:
        made.update(asdict(settings), anchors=anchors, reinforced=reinforced)
        raise StopIteration

    def trained(_method: str, **settings: Any) -> Any:
        return {name: settings[name] for name in ("learning_rate", "epochs", "max_length")}

    monkeypatch.setattr(whp, "make_labels", labels)
    monkeypatch.setattr(whp, "cut_blocks", lambda *_, **__: None)
    monkeypatch.setattr(whp, "read_anchors", lambda path: path)
    monkeypatch.setattr(whp, "_anchors", lambda o, *_: o.anchors or f"proposed from {o.background}")
    monkeypatch.setattr("unlearning.checkpoints.load.load_weights", lambda path, **_: path)
    monkeypatch.setattr("unlearning.checkpoints.locate.locate_checkpoint", lambda name: name)
    with pytest.raises(StopIteration):
        whp.make_generic_labels(replace(preparation(tokenizer), train=trained), options)
    if not made["alpha"]:  # base - 0 * ReLU(reinforced - baseline) is the base, whatever they are
        made.update(reinforced=None, relu_baseline=None)
    made["reinforced"] = made["reinforced"] if not isinstance(made["reinforced"], torch.nn.Module) else None
    return made


def preparation(tokenizer: PreTrainedTokenizerFast) -> PreparationInputs:
    return PreparationInputs(
        model=START, tokenizer=tokenizer, forget=[Example("Who?", "Ada Brook")], alternates=None, max_length=None,
        training=TrainOptions(), batch_size=1, seed=0, output_dir=None, progress=False,
        train=lambda *_, **__: START,
    )  # fmt: skip


@pytest.mark.parametrize("pairs", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", METHODS)
def test_an_option_changes_a_step_or_is_refused(
    name: str, pairs: bool, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    method = METHODS[name]
    talking = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    talking.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}[assistant]"
    cache: dict[Any, list[Any]] = {}

    def outcome(options: Any) -> list[Any]:
        if options not in cache:
            found = done_in_a_step(method, options)
            forgets = getattr(options, "gamma", 1) > 0
            if name == "altpo" and forgets:
                found.append(prepared_by_altpo(options, monkeypatch, talking))
            if name == "whp":
                found.append(prepared_by_whp(options, monkeypatch, tokenizer))
            cache[options] = found
        return cache[options]

    checked = 0
    for context in contexts(method, pairs=pairs):
        try:
            base, _ = resolve_options(name, method.options, context)
            check_weights(method, base)
        except InputError:
            continue  # the context itself is refused
        for field in dataclasses.fields(method.options):
            if field.name in context:
                continue
            for value in others(method, field.name, field.default):
                given = {**context, field.name: value}
                changed = method.options(**given)
                try:
                    resolve_options(name, method.options, given)
                    check_weights(method, changed)
                except InputError as error:
                    assert "\n" not in str(error)
                    if "nothing would be trained" not in str(error) and "`" + field.name + "`" in str(error):
                        assert outcome(changed) == outcome(base), f"{given} is refused and has an effect"
                else:
                    assert outcome(changed) != outcome(base), f"{given} is accepted and has no effect"
                checked += 1
    assert pairs or checked >= len(dataclasses.fields(method.options))


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        (
            "npo",
            {"alpha": 0, "retain_loss": "kl"},
            "`retain_loss` has no effect unless alpha is above 0, got kl. Remove",
        ),
        ("undial", {"retain_loss": "kl", "alpha": 0}, "`retain_loss` has no effect unless alpha is above 0"),
        ("npo", {"gamma": 0, "beta": 1}, "`beta` has no effect unless gamma is above 0, got 1"),
        ("blur", {"forget_loss": "ga", "beta": 1}, "`beta` has no effect unless forget_loss is npo or simnpo"),
        ("blur", {"variant": "sum", "clamp": "pcgrad"}, "`clamp` has no effect unless variant is blur or swapped"),
        ("rmu", {"steering_coefficient": 6.5, "steering_scale": 2}, "`steering_scale`.*steering_coefficient is none"),
        ("pdu", {"dual_warmup_steps": 2, "dual_warmup_ratio": 0.5}, "`dual_warmup_ratio`.*dual_warmup_steps is none"),
        ("npo", {"lora_alpha": 32}, "`lora_alpha` has no effect unless lora_rank is above 0, got 32"),
        ("npo", {"keep_checkpoints": 5}, "`keep_checkpoints` has no effect unless save_every is set"),
        ("npo", {"target_retain": 0.5}, "`target_retain` has no effect unless target_forget is set, got 0.5"),
        ("npo", {"benchmark_rows": 5}, "`benchmark_rows` has no effect unless benchmark is set"),
        ("npo", {"lora_rank": 2, "lora_dropout": 0.1}, "`lora_dropout` has no effect with npo.*Remove"),
        ("npo", {"gamma": 0, "alpha": 0}, "`gamma` and `alpha` must not all be 0 for npo: nothing would be trained"),
        ("undial", {"gamma": "0", "alpha": 0}, "`gamma` and `alpha` must not all be 0 for undial"),
        ("pdu", {"gamma": 0, "lambda0": 0, "eta": 0}, "`gamma` and `lambda0` and `eta` must not all be 0"),
    ],
    ids=str,
)
def test_what_would_do_nothing_is_refused_in_one_line(method: str, given: dict[str, Any], message: str) -> None:
    examples = build_examples()
    data = {"forget": examples[:4], "retain": examples[4:]}
    with pytest.raises(InputError, match=message) as error:
        train(method, model="no such model is needed", progress=False, **data, **given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("npo", {"alpha": 0, "retain_loss": "nll", "beta": 0.1}),  # the default is no wish
        ("npo", {"lora_rank": 2, "lora_alpha": 32}),
        ("npo", {"gamma": 0}),
        ("pdu", {"gamma": 0, "lambda0": 0}),
        ("pdu", {"lambda0": 0}),
    ],
    ids=str,
)
def test_what_does_something_is_not_refused(method: str, given: dict[str, Any]) -> None:
    own, _ = resolve_options(method, METHODS[method].options, given)
    check_weights(METHODS[method], own)
