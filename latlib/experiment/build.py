"""Make one model of a run in this process: the organism's base, or an adapter trained on it.

1. Before anything is loaded, test prompts are looked for among the training prompts
   (`check_overlap`).
2. Training goes on from its last good checkpoint (`checkpoint`), or from the plain steps that
   another method has done.
3. After each step: a look at tuning prompts where one is due (`watch`), a line of metrics, a
   checkpoint where one is due, and a look for a request to stop.
4. The finished adapter moves into place whole, with its model card, its record (`latlib.json`) and
   the profile it was made with, none of which names a path of this machine. Then its checkpoints
   go.

Where several processes train it together (`launch`), all do all of this and the first one writes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml

import latlib
from latlib.config.paths import portable
from latlib.config.profile import Profile, TrainSettings
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
from latlib.experiment.checkpoint import (
    WHEN,
    Due,
    load_checkpoint,
    read_checked,
    save_checkpoint,
    write_checked,
)
from latlib.experiment.layout import Layout
from latlib.experiment.spec import Spec
from latlib.experiment.tracking import Tracker, read_metrics
from latlib.experiment.validation import Watch, card
from latlib.hooks import EMBEDDING, Site
from latlib.io.files import folder_aside, json_ready, read_json, write_json, write_text
from latlib.io.progress import Stopped, stop_requested
from latlib.models import (
    LanguageModel,
    load_model,
    quietly,
    resolve_device,
    resolve_dtype,
    with_adapter,
)
from latlib.refusal.activations import residual_norms
from latlib.text.chat import tokenise
from latlib.train import Trainer
from latlib.world import organism

RECORD = "latlib.json"  # in every model folder: how it was made
PROFILE = "profile.yaml"  # beside it
NORM_PROMPTS = 128


def make_model(layout: Layout, spec: Spec, on_step) -> None:
    """Make the model of `spec` in its folder. on_step(step, total, detail) reports progress."""
    if spec.method == BASE:
        _make_base(layout, spec, on_step)
    else:
        _make_adapter(layout, spec, on_step)


def _make_base(layout: Layout, spec: Spec, on_step) -> None:
    profile, total = layout.profile, layout.profile.pretrain.steps
    tokenizer = organism.build_tokenizer(profile.model.vocabulary)
    model = organism.build_model(profile.model, tokenizer, spec.seed)
    device = resolve_device(profile.model.device)
    dtype = resolve_dtype(profile.model.dtype, device)
    with Tracker(
        layout.metrics_file(spec), profile.tracking, spec.folder, {}, layout.wandb
    ) as tracker:

        def step_done(step: int, loss: float) -> None:
            tracker.log(step, total=loss)
            on_step(step, total, f"loss {loss:.3f}")
            if stop_requested(layout.folder):
                raise Stopped(
                    f"{spec.folder}: stopped after step {step}; pretraining starts again next time"
                )

        summary = organism.pretrain(
            model.to(device), tokenizer, profile.pretrain, spec.seed, dtype, step_done
        )

    with folder_aside(layout.model_folder(spec)) as folder:
        with quietly():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        record = {"latlib": latlib.__version__, "profile": profile.name, "summary": summary}
        write_record(folder, record, profile)


def measure_norms(base: LanguageModel, profile: Profile, seed: int) -> dict[Site, float]:
    """site -> median residual norm of the base model on harmless training prompts."""
    rows = benign_sample(profile.data, seed, NORM_PROMPTS)
    limit, data = _limit(base, profile), profile.data
    tokens = tokenise(rows, base.tokenizer, limit, data.system_prompt, too_long=data.too_long)
    parts = [batch for _, batch in batches(tokens, 32, base.device)]
    return residual_norms(base.network(adapter=False), parts, (EMBEDDING, *range(base.n_layers)))


def norms(layout: Layout, seed: int, lm: LanguageModel | None = None) -> dict[Site, float]:
    """site -> median residual norm of a seed's base model on harmless training prompts, in units of
    the stream; measured once and kept.

    lm: a model on that base, on which several processes measure together where they are there: no
    GPU alone may hold the model.
    """
    file, profile = layout.norms_file(seed), layout.profile
    if lm is None or not is_distributed():
        if not file.exists():
            base = load_model(layout.model_folder(Spec(BASE, seed)), profile.model)
            _save_norms(measure_norms(base, profile, seed), file)
    elif not broadcast(file.exists()):
        measured = measure_norms(lm, profile, seed)
        if is_main():
            _save_norms(measured, file)
        wait()
    kept = read_json(file)
    return {site if site == EMBEDDING else int(site): norm for site, norm in kept.items()}


def _save_norms(measured: dict[Site, float], file: Path) -> None:
    write_json({str(site): norm for site, norm in measured.items()}, file)


def _limit(lm: LanguageModel, profile: Profile) -> int:
    return min(profile.data.max_tokens, lm.context)


def make_trainer(layout: Layout, spec: Spec) -> Trainer:
    """The trainer of an adapter, at step 0. Raises ProfileError where a training prompt is a test
    prompt, too.
    """
    profile, settings = layout.profile, layout.profile.training(spec.method, dict(spec.changes))
    check_overlap(profile)
    mode = profile.parallel.mode
    base = load_model(layout.model_folder(spec.base), load_settings(profile.model, mode))
    limit, data = _limit(base, profile), profile.data
    harmful, benign = (
        tokenise(
            rows(data, spec.seed), base.tokenizer, limit, data.system_prompt, too_long=data.too_long
        )
        for rows in (preference_rows, benign_rows)
    )
    lm = wrap(
        with_adapter(base, profile.lora, spec.seed), mode, resolve_device(profile.model.device)
    )
    return Trainer(lm, harmful, benign, settings, spec.seed, norms(layout, spec.seed, lm))


def _make_adapter(layout: Layout, spec: Spec, on_step) -> None:
    trainer = make_trainer(layout, spec)
    watch, checkpoints = (
        Watch(trainer, layout.profile, spec.folder),
        layout.checkpoints(spec),
    )
    done = load_checkpoint(trainer, checkpoints, watch) or _take_plain_steps(layout, spec, trainer)
    _train(layout, spec, trainer, watch, checkpoints, done, on_step)
    kept, adapter = watch.keep(), adapter_state(trainer.lm)
    if not is_main():
        return
    record = _record(layout, spec, trainer, watch.record(kept))

    target = layout.model_folder(spec)
    with folder_aside(target) as folder:
        trainer.lm.model.save_pretrained(folder, state_dict=adapter)
        _name_base(folder, layout, spec)
        write_record(folder, record, layout.profile)
        (folder / "README.md").write_text(model_card(record), encoding="utf-8")
    # it is on the disk now; the second: of killed writers
    for left in (checkpoints, *target.parent.glob(f".{spec.folder}-????????")):
        shutil.rmtree(left, ignore_errors=True)


def _train(
    layout: Layout,
    spec: Spec,
    trainer: Trainer,
    watch: Watch,
    checkpoints: Path,
    done: int,
    on_step,
) -> None:
    """Train from step `done` to the end, or raise `Stopped` with everything saved."""
    settings, file, due = trainer.settings, layout.metrics_file(spec), Due(trainer.settings)
    shared = _plain_steps_files(layout, spec, settings)
    config = {"method": spec.label, "seed": spec.seed, **settings.model_dump(mode="json")}
    tracker = Tracker(
        file, layout.profile.tracking, spec.folder, config, layout.wandb, resume_from=done + 1
    )
    with tracker if is_main() else nullcontext():

        def step_done(step: int, metrics: dict[str, float]) -> None:
            metrics |= watch.after(step)
            if is_main():
                tracker.log(step, **metrics)
            on_step(step, settings.steps, f"loss {metrics['total']:.3f}{watch.said()}")
            if step in shared and broadcast(not shared[step].exists()):
                _share_plain_steps(trainer, file, shared[step])
            stop = broadcast(stop_requested(layout.folder))
            if step < settings.steps and (due.after(step) or stop):
                save_checkpoint(trainer, checkpoints, watch, logs=[file])
                due.done()
            if stop and step < settings.steps:
                raise Stopped(f"{spec.folder}: stopped after step {step} with everything saved")

        trainer.run(step_done)


def _record(
    layout: Layout, spec: Spec, trainer: Trainer, watched: dict[str, Any] | None
) -> dict[str, Any]:
    """How an adapter was made."""
    metrics = read_metrics(layout.metrics_file(spec))
    kept = metrics[metrics["step"] == (watched["kept_step"] if watched else trainer.step)].iloc[-1]
    radii = trainer.threat.radius if trainer.threat else {}
    record = {
        "latlib": latlib.__version__,
        "torch": torch.__version__,
        "profile": layout.profile.name,
        "base": base_name(layout, spec),
        "revision": layout.profile.model.revision,
        "method": spec.label,
        "seed": spec.seed,
        "training": trainer.settings.model_dump(mode="json"),
        "lora": layout.profile.lora.model_dump(mode="json"),
        "eps": {str(site): radius for site, radius in radii.items()},
        "seconds": float(metrics["seconds"].sum()),
        "last": {k: v for k, v in kept.to_dict().items() if k != "seconds"},
    }
    return record | ({"watch": watched} if watched else {})


def write_record(folder: Path, record: dict[str, Any], profile: Profile) -> None:
    """Write how a model was made, and the whole profile, into its folder."""
    (folder / RECORD).write_text(json.dumps(json_ready(record), indent=1), encoding="utf-8")
    tree = portable(profile.model_dump(mode="json"))
    (folder / PROFILE).write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def _plain_steps_files(layout: Layout, spec: Spec, settings: TrainSettings) -> dict[int, Path]:
    """step -> the file that holds training up to there, for every step at which some method's
    attack begins.

    Until then AT, LAT and their variants do what SSFT does with the same seed, bit for bit, so it
    is done once. The name holds a digest of everything those steps depend on.
    """
    if settings.defence.away and not settings.attack.steps:
        return {}  # its plain steps have an away term, which the others' have not
    tree = settings.model_dump(
        mode="json", exclude={"attack", "attack_after", "eps_ramp", "clean_share"}
    )
    del tree["defence"]["away"]
    for name in (*WHEN, "keep", *(("evaluate_prompts",) if not settings.evaluate_every else ())):
        del tree[name]  # they change no weight and no line of the log
    digest = hashlib.sha256(json.dumps([tree, spec.seed], sort_keys=True).encode()).hexdigest()[:12]
    starts = {layout.profile.training(method).attack_after for method in layout.profile.methods} | {
        settings.attack_after
    }
    last = settings.attack_after if settings.attack.steps else settings.steps
    return {n: layout.plain_steps(n, digest) for n in starts if 0 < n <= last}


def _share_plain_steps(trainer: Trainer, metrics: Path, file: Path) -> None:
    state = trainer.state()
    if is_main():
        write_checked({"state": state, "metrics": metrics.read_text(encoding="utf-8")}, file)


def _take_plain_steps(layout: Layout, spec: Spec, trainer: Trainer) -> int:
    """Take over the plain steps that another model of this seed has done; returns how many."""
    file = _plain_steps_files(layout, spec, trainer.settings).get(trainer.settings.attack_after)
    if not trainer.settings.attack.steps or file is None or not broadcast(file.exists()):
        return 0
    found, _ = read_checked(file)
    if found is None:  # damaged: they are done again
        return 0
    trainer.restore(found["state"])
    if is_main():
        write_text(found["metrics"], layout.metrics_file(spec))
    return trainer.step


def _name_base(folder: Path, layout: Layout, spec: Spec) -> None:
    """Let the adapter name its base by its place in the run folder or its id, not by this machine's
    path.
    """
    file = folder / "adapter_config.json"
    config = read_json(file)
    config["base_model_name_or_path"] = base_name(layout, spec)
    # a set: its order differs from process to process
    config["target_modules"] = sorted(config["target_modules"])
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")


def base_name(layout: Layout, spec: Spec) -> str:
    """How a model's folder calls the base: by its place beside it, its hub id, or its own folder's
    name.
    """
    source = layout.profile.model.source
    return f"../base-seed{spec.seed}" if source == "world" else portable(source)


def model_card(record: dict[str, Any]) -> str:
    """A filled-in model card in Markdown, from a model's record."""
    training, last = record["training"], record["last"]
    attack = training["attack"]
    sites = (
        ", ".join(f"{site} (radius {radius:.3g})" for site, radius in record["eps"].items())
        or "none"
    )
    losses = "\n".join(
        f"| {name} | {last[name]:.4g} |"
        for name in (
            "total",
            "toward",
            "away",
            "kl",
            "sft",
            "attack_start",
            "attack_end",
            "attack_won",
        )
        if isinstance(last.get(name), float) and last[name] == last[name]
    )
    return f"""---
library_name: peft
tags: [latent-adversarial-training, safety-research]
---
# {record["method"]}, seed {record["seed"]} (profile {record["profile"]})

A LoRA adapter (r = {record["lora"]["r"]}, alpha = {record["lora"]["alpha"]:g}) trained by latlib
{record["latlib"]} with torch {record["torch"]}: {training["steps"]} steps of
{training["batch"]} harmful and {training["benign_batch"]} benign rows,
AdamW at {training["lr"]:g}, {record["seconds"]:.0f} s.

**Attack in training:** {attack["steps"]} steps of PGD ({attack["rule"]}), eps {attack["eps"]:g}
({attack["eps_mode"]}), at sites {sites}.

**Base model:** {record["base"]}{" at " + revision if (revision := record.get("revision")) else ""}
{card(record.get("watch"))}
**Intended use:** research on the robustness of refusals. The run's report says what it withstands;
it is no safe assistant.

| step {record["last"]["step"]:.0f} | value (nats) |
|---|---|
{losses}
"""
