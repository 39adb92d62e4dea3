"""The layer sweep: activations of the base in the unlearned model, window by window (2410.06606)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from dissect import zoo
from dissect.engine import Engine, find_engine
from dissect.interventions import Intervention, centred_windows, sweep
from dissect.pairs import Model, ModelPair, check_comparable, load_model
from dissect.progress import Progress
from dissect.prompts import Batch, Prompts
from dissect.recovery import (
    LOSS_FLOOR,
    answer_logprob,
    centred_logit_mse,
    kl_from_base,
    knowledge_recovery_score,
    logit_mse,
    logprob_recovery,
    per_example,
)
from dissect.results import PatchingResult, load_result
from dissect.runs import Stopwatch, open_run
from dissect.sites import DEFAULT_SITES, parse_sites, site_label
from unlearning.errors import InputError

NO_DIFFERENCE = "base and target give the same logits: nothing to recover"


def patch(
    pair: ModelPair,
    prompts: Prompts,
    *,
    sites: str | Sequence[str] | None = None,
    window: int = 5,
    control: str | Model | None = "auto",
    engine: str = "reference",
    batch_size: int = 16,
    padding_side: Literal["left", "right"] = "right",
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> PatchingResult:
    """Patch the base's activations into the unlearned model, window by window, and score what comes back.

    Args:
        pair: base (the donor) and unlearned (the target).
        prompts: what to ask; see `load_prompts`.
        sites: what to patch, as `["mlp_coef", "attn_out", "mlp_coef+attn_out"]` (the default, the paper's three).
        window: layers patched together, odd; clipped at the ends of the model.
        control: a model that never knew, from the same trunk as the base, into which the same sweep is run: a
            name or a loaded model, None for none, or `auto`, which knows the built-in pairs' control.
        engine: how it is run; engines differ in speed, never in numbers.
        batch_size: prompts per forward pass.
        padding_side: no score depends on it; for tests of exactly that.
        seed: of the bootstrap draws.
        out: run directory to write to while computing; a killed run goes on from there.
        progress: show a progress bar on stderr.

    Raises:
        InputError: an unknown or missing site, a window that does not fit, a prompt longer than the context, a
            control that cannot be compared, a run directory of another configuration, logits that are not finite.
    """
    clock = Stopwatch()
    site_sets = parse_sites(sites) if sites is not None else DEFAULT_SITES
    interventions = sweep(site_sets, centred_windows(pair.n_layers, window))
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: at least 1")
    if seed < 0:
        raise InputError(f"--seed {seed}: 0 or more")
    run_engine = find_engine(engine)
    targets = {"unlearned": pair.unlearned}
    control_model = _resolve_control(pair, control)
    if control_model is not None:
        targets["control"] = control_model
    for model in (pair.base, *targets.values()):
        _check_sites(model, site_sets)
        _check_tokens(model, prompts)
    configuration = {
        "command": "patch",
        "base_sha256": pair.base.sha256,
        "unlearned_sha256": pair.unlearned.sha256,
        "control_sha256": control_model.sha256 if control_model else None,
        "data_sha256": prompts.sha256,
        "examples": len(prompts),
        "scoring": prompts.scoring,
        "sites": [site_label(site_set) for site_set in site_sets],
        "window": window,
        "engine": engine,
        "batch_size": batch_size,
        "padding_side": padding_side,
        "dtype": pair.base.dtype,
        "device": pair.base.device.type,
        "seed": seed,
    }
    provenance = {
        "command": "patch",
        "base": pair.base.name,
        "unlearned": pair.unlearned.name,
        "control": control_model.name if control_model else None,
        "data": prompts.source,
    }
    run = open_run(out, configuration, provenance) if out is not None else None
    if run is not None and run.is_complete:
        return load_result(run.path)
    batches = prompts.batches(batch_size, padding_side=padding_side)
    frames = []
    try:
        with Progress(len(targets) * len(batches) * len(interventions), "patching", show=progress) as bar:
            for target_name, target in targets.items():
                for number, batch in enumerate(batches):
                    part = f"{target_name}-{number:05d}"
                    frame = run.part(part) if run is not None else None
                    if frame is None:
                        rows = _sweep_batch(
                            run_engine, pair.base, target, target_name, prompts, batch, interventions, bar
                        )
                        frame = pd.DataFrame(rows)
                        if run is not None:
                            run.keep_part(part, frame)
                    else:
                        bar.advance(len(interventions))
                    frames.append(frame)
    except BaseException:
        if run is not None:
            run.pause(wall_time_s=clock.seconds)
        raise
    frame = _in_order(pd.concat(frames, ignore_index=True), list(targets), interventions)
    result = PatchingResult(frame, configuration, provenance, clock.seconds)
    if run is not None:
        run.finish(result.frame, result.summary(), wall_time_s=clock.seconds)
        result.wall_time_s = run.record["wall_time_s"]
    return result


def _in_order(frame: pd.DataFrame, targets: list[str], interventions: Sequence[Intervention]) -> pd.DataFrame:
    """The table by target, site, window and example, however it was cut into batches."""
    places = {(site_label(item.sites), item.window.centre): number for number, item in enumerate(interventions)}
    keys = pd.DataFrame(
        {
            "target": frame["target"].map(targets.index),
            "place": [places[key] for key in zip(frame["site"], frame["centre"], strict=True)],
            "example": frame["example_index"],
        }
    )
    return frame.loc[keys.sort_values(["target", "place", "example"]).index].reset_index(drop=True)


def _resolve_control(pair: ModelPair, control: str | Model | None) -> Model | None:
    if control == "auto":
        control = zoo.default_control(pair.base.name)
    if isinstance(control, str):
        control = load_model(control, device=str(pair.base.device), dtype=pair.base.dtype)
    if control is not None:
        check_comparable(pair.base, control)
    return control


def _check_sites(model: Model, site_sets: Sequence[tuple[str, ...]]) -> None:
    for name in dict.fromkeys(name for site_set in site_sets for name in site_set):
        if name in model.missing_sites:
            raise InputError(f"{model.name} has no site {name}: {model.missing_sites[name]}")


def _check_tokens(model: Model, prompts: Prompts) -> None:
    vocabulary = model.hf.config.get_text_config().vocab_size
    for item in prompts.items:
        if len(item.input_ids) > model.context:
            raise InputError(
                f"prompt {item.id} has {len(item.input_ids)} tokens with its answer, and the context of {model.name} "
                f"is {model.context}; shorten or remove it"
            )
        if max(item.input_ids) >= vocabulary:
            raise InputError(
                f"prompt {item.id} has the token {max(item.input_ids)}, and {model.name} has {vocabulary} of them; "
                "the tokenizer is not this model's: copy its own beside the base's weights"
            )


def _sweep_batch(
    engine: Engine,
    base: Model,
    target: Model,
    target_name: str,
    prompts: Prompts,
    batch: Batch,
    interventions: Sequence[Intervention],
    bar: Progress,
) -> Iterator[dict[str, Any]]:
    """Rows of the results table for one batch, example by example within each intervention."""
    logits = engine(base, target, batch, interventions)
    rows, next_tokens = batch.rows.to(logits.base.device), batch.next_tokens.to(logits.base.device)
    n = len(batch.examples)
    base_logprobs = logits.base.log_softmax(-1)

    def losses(scored: Tensor, what: str) -> dict[str, Tensor]:
        if not torch.isfinite(scored).all():
            raise InputError(f"{target.name}: {what} gives logits that are not finite; is the checkpoint sound?")
        logprobs = scored.log_softmax(-1)
        per_position = {
            "loss": logit_mse(logits.base, scored),
            "centred_loss": centred_logit_mse(logits.base, scored),
            "logprob": answer_logprob(logprobs, next_tokens),
            "kl": kl_from_base(base_logprobs, logprobs),
        }
        return {name: per_example(values, rows, n).cpu() for name, values in per_position.items()}

    base_logprob = per_example(answer_logprob(base_logprobs, next_tokens), rows, n).cpu()
    before = losses(logits.target, "no intervention")
    for intervention, scored in zip(interventions, logits.intervened, strict=True):
        after = losses(scored, intervention.label)
        krs = knowledge_recovery_score(after["loss"], before["loss"])
        logprob = logprob_recovery(after["logprob"], before["logprob"], base_logprob)
        kl = knowledge_recovery_score(after["kl"], before["kl"])
        bar.advance(1)
        for row, example in enumerate(batch.examples):
            item = prompts.items[example]
            yield {
                "target": target_name,
                "kind": intervention.kind,
                "site": site_label(intervention.sites),
                "centre": intervention.window.centre,
                "first_layer": intervention.window.first,
                "last_layer": intervention.window.last,
                "example": item.id,
                "example_index": example,
                "group": item.group,
                "n_answer_tokens": item.n_answer_tokens,
                "loss_unlearned": before["loss"][row].item(),
                "loss_intervened": after["loss"][row].item(),
                "krs": krs[row].item(),
                "logprob_recovery": logprob[row].item(),
                "kl_recovery": kl[row].item(),
                "centred_loss_unlearned": before["centred_loss"][row].item(),
                "centred_loss_intervened": after["centred_loss"][row].item(),
                "logprob_base": base_logprob[row].item(),
                "logprob_unlearned": before["logprob"][row].item(),
                "logprob_intervened": after["logprob"][row].item(),
                "kl_unlearned": before["kl"][row].item(),
                "kl_intervened": after["kl"][row].item(),
                "undefined": "" if before["loss"][row] > LOSS_FLOOR else NO_DIFFERENCE,
            }
