"""Make one model of a run in this process: the organism's base, or an adapter trained on it.

1. Before anything is loaded, test prompts are looked for among the training prompts
   (`check_overlap`).
2. Training goes on from its last good checkpoint (`checkpoint`), or from the plain steps that
   another method has done (`plain_steps`).
3. After each step: validation where it is due (`validation`), a line of metrics, a checkpoint where
   one is due, and a look for a request to stop.
4. The finished adapter moves into place whole, with its model card and its record (`record`). Then
   its checkpoints go.

Where several processes train it together (`launch`), all do all of this and the first one writes.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import latlib
from latlib.batch import collate
from latlib.config.profile import Profile
from latlib.data.prompts import in_the_world
from latlib.data.splits import benign_rows, benign_sample, check_overlap, preference_rows
from latlib.distributed.ranks import (
    adapter_state,
    broadcast,
    is_distributed,
    is_main,
    load_settings,
    wait,
    wrap,
)
from latlib.evaluation.generate import batches
from latlib.evaluation.outcomes import BASE
from latlib.experiment.alarms import Alarms
from latlib.experiment.checkpoint import Due, load_checkpoint, save_checkpoint
from latlib.experiment.layout import METRICS, Layout
from latlib.experiment.plain_steps import PlainSteps
from latlib.experiment.record import base_name, model_card, write_record
from latlib.experiment.spec import Spec
from latlib.experiment.tracking import Tracker, read_metrics
from latlib.experiment.validation import Validator, training_tokens
from latlib.io.files import Json, enter, folder_aside, read_json, write_json
from latlib.io.hub import quietly
from latlib.io.machine import resolve_device, resolve_dtype
from latlib.io.progress import OnStep, Stopped, saving_on_signals, stop_requested
from latlib.models import LanguageModel, load_model, with_adapter
from latlib.redteam.room import check_room
from latlib.redteam.rounding import lost_in_rounding
from latlib.refusal.activations import residual_norms
from latlib.threat import EMBEDDING, Site
from latlib.train import Metrics, Trainer
from latlib.world import organism

NORM_PROMPTS = 128


def make_base(layout: Layout, spec: Spec, on_step: OnStep) -> None:
    """Make the organism's base model in its folder. on_step(step, total, detail) reports progress.

    Raises `Stopped` where somebody asked for it: then nothing of it is kept.
    """
    profile = layout.profile
    described = profile.model
    tokenizer = organism.build_tokenizer(
        described.vocabulary, described.post_instruction_tokens, profile.data.division
    )
    model = organism.build_model(described, tokenizer, spec.seed)
    device = resolve_device(profile.model.device)
    dtype = resolve_dtype(profile.model.dtype, device)
    settings = profile.pretrain
    tracker = Tracker(layout.metrics_file(spec), profile.tracking, spec.folder)

    def step_done(step: int, loss: float) -> None:
        tracker.log(step, total=loss)
        on_step(step, settings.steps, f"loss {loss:.3f}")
        if stop_requested(layout.folder):
            raise Stopped(
                f"{spec.folder}: stopped after step {step}; pretraining starts again next time"
            )

    with tracker, saving_on_signals():
        model = model.to(device)
        batches = organism.pretraining_rows(tokenizer, settings, spec.seed, profile.data.division)
        summary = organism.pretrain(model, batches, settings, dtype, step_done)
    record = {"latlib": latlib.__version__, "profile": profile.name, "summary": summary}
    with folder_aside(layout.model_folder(spec)) as folder:
        with quietly():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        write_record(folder, record, profile)
        _keep_log(layout, spec, folder)


# ---- residual norms, which a relative eps is a share of


def norms(layout: Layout, seed: int, lm: LanguageModel | None = None) -> dict[Site, float]:
    """site -> median residual norm of a seed's base model on harmless training prompts, in units of
    the stream; measured once and kept.

    lm: a model on that base, on which several processes measure together where they are there: no
    GPU alone may hold the model.
    """
    file, profile = layout.norms_file(seed), layout.profile
    if not broadcast(layout.whole(file)):
        if lm is None or not is_distributed():
            folder = layout.model_folder(Spec(BASE, seed))
            lm = load_model(folder, profile.model)
        measured = measure_norms(lm, profile, seed)
        if is_main():
            write_json(measured, file)
        wait()
    kept = read_json(file)
    return {site if site == EMBEDDING else int(site): norm for site, norm in kept.items()}


def measure_norms(base: LanguageModel, profile: Profile, seed: int) -> dict[Site, float]:
    """site -> median residual norm of the base model on harmless training prompts."""
    tokens = training_tokens(benign_sample(profile.data, seed, NORM_PROMPTS), base, profile)
    parts = [batch for _, batch in batches(tokens, 32, base.device)]
    return residual_norms(base.network(adapter=False), parts, (EMBEDDING, *range(base.n_layers)))


# ---- adapters


def make_trainer(layout: Layout, spec: Spec) -> Trainer:
    """The trainer of an adapter, at step 0. Raises ProfileError where a training prompt is a test
    prompt, too, or a prompt does not fit the model's context as it will be asked.
    """
    profile, seed = layout.profile, spec.seed
    settings = profile.training(spec.method, dict(spec.changes))
    check_overlap(profile.data)
    mode = profile.parallel.mode
    model_settings = load_settings(profile.model, mode)
    base = load_model(layout.model_folder(spec.base), model_settings)
    harmful = training_tokens(preference_rows(profile.data, seed), base, profile)
    benign = training_tokens(benign_rows(profile.data, seed), base, profile)
    if not in_the_world(profile):  # of which `--check` has read everything
        check_room(profile, base.tokenizer, base.context)
    device = resolve_device(profile.model.device)
    lm: Any = wrap(with_adapter(base, profile.lora, seed), mode, device)
    norms_of_base = norms(layout, seed, lm)
    trainer = Trainer(lm, harmful, benign, settings, seed, norms_of_base)
    _warn(spec, trainer)
    return trainer


def _warn(spec: Spec, trainer: Trainer) -> None:
    """Warn of a training attack whose radius means nothing."""
    if trainer.threat is None:
        return
    network = trainer.lm.network()
    unreached = trainer.settings.attack.never_binds(min(trainer.threat.radii), network.d_model)
    batch = collate(trainer.harmful[: trainer.settings.micro_batch], device=trainer.lm.device)
    lost = lost_in_rounding(network, batch, trainer.threat)
    for text in filter(None, (unreached, lost)):
        warnings.warn(f"{spec.name}: {text}", stacklevel=3)


def make_adapter(layout: Layout, spec: Spec, on_step: OnStep) -> None:
    """Train an adapter, or what is left of its training, into its folder. on_step(step, total,
    detail) reports progress.

    Raises `Stopped` where somebody asked for it, with everything saved.
    """
    profile, name, log = layout.profile, spec.folder, layout.metrics_file(spec)
    trainer: Any = make_trainer(layout, spec)
    settings = trainer.settings
    validator = Validator(trainer, profile, name)
    plain_steps = PlainSteps(layout, settings, spec.seed)
    checkpoints = layout.checkpoints(spec)
    done = load_checkpoint(trainer, checkpoints, validator) or plain_steps.take(trainer, log)
    config = {"method": spec.label, "seed": spec.seed, **settings.model_dump(mode="json")}
    tracker = Tracker(log, profile.tracking, name, config, done + 1)
    due = Due(settings)
    alarms = Alarms(trainer, name)

    def step_done(step: int, metrics: Metrics) -> None:
        metrics |= validator.after(step)
        if is_main():
            tracker.log(step, **metrics)
            alarms.after(step, metrics)
        loss = metrics.get("total", math.nan)
        on_step(step, settings.steps, f"loss {loss:.3f}{validator.line()}")
        plain_steps.share(trainer, log)
        stop = broadcast(stop_requested(layout.folder))
        if step < settings.steps and (due.after(step) or stop):
            save_checkpoint(trainer, checkpoints, validator, log)
            due.done()
            if stop:
                raise Stopped(f"{name}: stopped after step {step} with everything saved")

    with tracker if is_main() else nullcontext(), saving_on_signals():
        if not is_distributed():  # several would wait for the one that is out of memory
            trainer.train_step = _within_memory(trainer, name)
        trainer.run(step_done)
    kept_step = validator.keep()
    adapter = adapter_state(validator.lm)
    if is_main():
        _save(layout, spec, adapter, validator, kept_step)
        shutil.rmtree(checkpoints, ignore_errors=True)


def _within_memory(trainer: Any, name: str) -> Callable[[], Metrics]:
    """A training step that is done again with half as many rows at a time when a GPU's memory runs
    out; what is trained is the same. (With `iterations` above 1, updates that were made before it
    ran out stay.)"""
    plain = trainer.train_step

    def step() -> Metrics:
        while True:
            try:
                return plain()
            except torch.OutOfMemoryError:
                if trainer.micro_batch == 1:
                    raise
                trainer.micro_batch //= 2
                line = f"step {trainer.step + 1} with train.micro_batch = {trainer.micro_batch}"
                print(f"training: {name}: out of memory: {line}", file=sys.stderr, flush=True)
            torch.cuda.empty_cache()  # of what the error no longer holds

    return step


def _save(
    layout: Layout, spec: Spec, adapter: dict[str, Tensor], validator: Validator, kept_step: int
) -> None:
    """Put the adapter into its place; then what killed writers left goes."""
    target = layout.model_folder(spec)
    record = _record(layout, spec, validator, kept_step)
    model: Any = validator.lm.model
    with folder_aside(target) as folder:
        model.save_pretrained(folder, state_dict=adapter)
        _name_base(folder, record["base"])
        write_record(folder, record, layout.profile, model_card(record))
        _keep_log(layout, spec, folder)
    for left in target.parent.glob(f".{spec.folder}.{'?' * 32}"):  # see `io.files.aside`
        shutil.rmtree(left, ignore_errors=True)


def _keep_log(layout: Layout, spec: Spec, folder: Path) -> None:
    """Finish a model's log, and put a copy into its folder."""
    log = layout.metrics_file(spec)
    enter(log)
    shutil.copyfile(log, folder / METRICS)


def _record(layout: Layout, spec: Spec, validator: Validator, kept_step: int) -> Json:
    """How it was made. kept_step: the step that is kept."""
    profile, threat = layout.profile, validator.trainer.threat
    metrics = read_metrics(layout.metrics_file(spec))
    last = metrics[metrics["step"] == kept_step].iloc[-1].drop("seconds").dropna()
    record = {
        "latlib": latlib.__version__,
        "torch": torch.__version__,
        "profile": profile.name,
        "base": base_name(profile, spec),
        "revision": profile.model.revision,
        "inputs": layout.inputs(spec),
        "method": spec.label,
        "seed": spec.seed,
        "training": validator.settings.model_dump(mode="json"),
        "lora": profile.lora.model_dump(mode="json"),
        "eps": {str(site): radius for site, radius in threat.radius.items()} if threat else {},
        "seconds": float(metrics["seconds"].sum()),
        "last": last.to_dict(),
    }
    if validation := validator.record(kept_step):
        record["validation"] = validation
    return record


def _name_base(folder: Path, name: str) -> None:
    """Let the adapter name its base by its place in the run folder or its id, not by this machine's
    path.
    """
    file = folder / "adapter_config.json"
    config = read_json(file)
    config["base_model_name_or_path"] = name
    # a set: its order differs from process to process
    config["target_modules"] = sorted(config["target_modules"])
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")
