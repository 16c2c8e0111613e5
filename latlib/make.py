"""Make one model of a run: the organism's base, or an adapter trained on it. Called by `run.Run`, one at a time.

Training goes on from its checkpoint if there is one, logs every step, looks for a request to stop, and moves the
finished adapter with its model card into place as the last thing it does.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import latlib
from latlib import organism
from latlib.activations import residual_norms
from latlib.checkpoint import load_checkpoint, save_checkpoint
from latlib.data import tokenise
from latlib.evaluate import batches
from latlib.hooks import EMBEDDING, Site
from latlib.models import LanguageModel, load, quietly, resolve_device, resolve_dtype, save_folder, with_adapter
from latlib.profile import Profile, TrainSettings
from latlib.progress import Stopped, stop_requested
from latlib.rows import benign_rows, preference_rows
from latlib.tracking import Tracker, read_metrics
from latlib.train import Trainer

if TYPE_CHECKING:
    from latlib.run import Run, Spec

RECORD = "latlib.json"  # in every model folder: how it was made
NORM_PROMPTS = 128


def make_model(run: Run, spec: Spec, on_step) -> None:
    """Make the model of `spec` in its folder. on_step(step, total, detail) reports progress."""
    if spec.method == "base":
        _make_base(run, spec, on_step)
    else:
        _make_adapter(run, spec, on_step)


def _make_base(run: Run, spec: Spec, on_step) -> None:
    profile, total = run.profile, run.profile.pretrain.steps
    tokenizer = organism.build_tokenizer(profile.model.vocabulary)
    model = organism.build_model(profile.model, tokenizer, spec.seed)
    device = resolve_device(profile.model.device)
    dtype = resolve_dtype(profile.model.dtype, device)
    with Tracker(run.metrics_file(spec), profile.tracking, spec.folder, {}, run.folder / "wandb") as tracker:

        def step_done(step: int, loss: float) -> None:
            tracker.log(step, total=loss)
            on_step(step, total, f"loss {loss:.3f}")
            if stop_requested(run.folder):
                raise Stopped(f"{spec.folder}: stopped after step {step}; pretraining starts again next time")

        summary = organism.pretrain(model.to(device), tokenizer, profile.pretrain, spec.seed, dtype, step_done)

    def write(folder: Path) -> None:
        with quietly():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        record = {"latlib": latlib.__version__, "profile": profile.name, "summary": summary}
        (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")

    save_folder(run.model_folder(spec), write)


def measure_norms(base: LanguageModel, profile: Profile, seed: int) -> dict[Site, float]:
    """site -> median residual norm of the base model on harmless training prompts."""
    rows = benign_rows(profile.data.model_copy(update={"rows": NORM_PROMPTS}), seed)
    tokens = tokenise(rows, base.tokenizer, _limit(base, profile), profile.data.system_prompt)
    parts = [batch for _, batch in batches(tokens, 32, base.device)]
    return residual_norms(base.network(adapter=False), parts, (EMBEDDING, *range(base.n_layers)))


def _limit(lm: LanguageModel, profile: Profile) -> int:
    return min(profile.data.max_tokens, lm.context)


def make_trainer(run: Run, spec: Spec) -> Trainer:
    """The trainer of an adapter, at step 0."""
    profile, settings = run.profile, run.profile.training(spec.method, dict(spec.changes))
    base = load(run.model_folder(run.spec("base", spec.seed)), profile.model)
    limit, system = _limit(base, profile), profile.data.system_prompt
    harmful = tokenise(preference_rows(profile.data, spec.seed), base.tokenizer, limit, system)
    benign = tokenise(benign_rows(profile.data, spec.seed), base.tokenizer, limit, system)
    lm = with_adapter(base, profile.lora, spec.seed)
    return Trainer(lm, harmful, benign, settings, spec.seed, run.norms(spec.seed))


def _make_adapter(run: Run, spec: Spec, on_step) -> None:
    trainer = make_trainer(run, spec)
    settings, checkpoint = trainer.settings, run.folder / "models" / f".{spec.folder}.checkpoint.pt"
    done = load_checkpoint(trainer, checkpoint) or _take_plain_steps(run, spec, trainer)
    shared = _plain_steps_files(run, spec, settings)
    config = {"method": spec.label, "seed": spec.seed, **settings.model_dump(mode="json")}
    file = run.metrics_file(spec)
    tracker = Tracker(file, run.profile.tracking, spec.folder, config, run.folder / "wandb", resume_from=done + 1)
    with tracker:

        def step_done(step: int, metrics: dict[str, float]) -> None:
            tracker.log(step, **metrics)
            on_step(step, settings.steps, f"loss {metrics['total']:.3f}")
            if step in shared and not shared[step].exists():
                _share_plain_steps(trainer, file, shared[step])
            stop = stop_requested(run.folder)
            if step < settings.steps and (stop or step % settings.checkpoint_every == 0):
                save_checkpoint(trainer, checkpoint)
            if stop and step < settings.steps:
                raise Stopped(f"{spec.folder}: stopped after step {step} with everything saved")

        trainer.run(step_done)
    metrics = read_metrics(file)
    record = {
        "latlib": latlib.__version__,
        "torch": torch.__version__,
        "profile": run.profile.name,
        "method": spec.label,
        "seed": spec.seed,
        "training": settings.model_dump(mode="json"),
        "lora": run.profile.lora.model_dump(mode="json"),
        "eps": {str(site): radius for site, radius in trainer.eps.items()},
        "seconds": float(metrics["seconds"].sum()),
        "last": {k: v for k, v in metrics.iloc[-1].to_dict().items() if k != "seconds"},
    }

    def write(folder: Path) -> None:
        trainer.lm.model.save_pretrained(folder)
        _name_base(folder, run, spec)
        (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        (folder / "README.md").write_text(model_card(record), encoding="utf-8")

    save_folder(run.model_folder(spec), write)
    checkpoint.unlink(missing_ok=True)


def _plain_steps_files(run: Run, spec: Spec, settings: TrainSettings) -> dict[int, Path]:
    """step -> the file that holds training up to there, for every step at which some method's attack begins.

    Until then AT, LAT and their variants do what SSFT does with the same seed, bit for bit, so it is done once. The
    name holds a digest of everything those steps depend on.
    """
    if settings.defence.away and not settings.attack.steps:
        return {}  # its plain steps have an away term, which the others' have not
    tree = settings.model_dump(mode="json", exclude={"attack", "attack_after", "eps_ramp", "clean_share"})
    del tree["defence"]["away"], tree["checkpoint_every"]
    digest = hashlib.sha256(json.dumps([tree, spec.seed], sort_keys=True).encode()).hexdigest()[:12]
    starts = {run.profile.training(method).attack_after for method in run.profile.methods} | {settings.attack_after}
    last = settings.attack_after if settings.attack.steps else settings.steps
    return {n: run.folder / "models" / f".plain-{n}-{digest}.pt" for n in starts if 0 < n <= last}


def _share_plain_steps(trainer: Trainer, metrics: Path, file: Path) -> None:
    aside = file.with_suffix(f".{os.getpid()}")
    torch.save({"state": trainer.state(), "metrics": metrics.read_text(encoding="utf-8")}, aside)
    aside.replace(file)


def _take_plain_steps(run: Run, spec: Spec, trainer: Trainer) -> int:
    """Take over the plain steps that another model of this seed has done; returns how many."""
    file = _plain_steps_files(run, spec, trainer.settings).get(trainer.settings.attack_after)
    if not trainer.settings.attack.steps or file is None or not file.exists():
        return 0
    found = torch.load(file, map_location=trainer.lm.device, weights_only=True)
    trainer.restore(found["state"])
    metrics = run.metrics_file(spec)
    aside = metrics.with_suffix(".partial")
    aside.write_text(found["metrics"], encoding="utf-8")
    aside.replace(metrics)
    return trainer.step


def _name_base(folder: Path, run: Run, spec: Spec) -> None:
    """Let the adapter name its base by its place in the run folder, not by this machine's path."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    source = run.profile.model.source
    config["base_model_name_or_path"] = f"../base-seed{spec.seed}" if source == "world" else source
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")


def model_card(record: dict[str, Any]) -> str:
    """A filled-in model card in Markdown, from a model's record."""
    training, last = record["training"], record["last"]
    attack = training["attack"]
    sites = ", ".join(f"{site} (radius {radius:.3g})" for site, radius in record["eps"].items()) or "none"
    losses = "\n".join(
        f"| {name} | {last[name]:.4g} |"
        for name in ("total", "toward", "away", "kl", "sft", "attack_start", "attack_end", "attack_won")
        if isinstance(last.get(name), float) and last[name] == last[name]
    )
    return f"""---
library_name: peft
tags: [latent-adversarial-training, safety-research]
---
# {record["method"]}, seed {record["seed"]} (profile {record["profile"]})

A LoRA adapter (r = {record["lora"]["r"]}, alpha = {record["lora"]["alpha"]:g}) trained by latlib {record["latlib"]}
with torch {record["torch"]}: {training["steps"]} steps of {training["batch"]} harmful and
{training["benign_batch"]} benign rows, AdamW at {training["lr"]:g}, {record["seconds"]:.0f} s.

**Attack in training:** {attack["steps"]} steps of PGD ({attack["rule"]}), eps {attack["eps"]:g}
({attack["eps_mode"]}), at sites {sites}.

**Intended use:** research on the robustness of refusals. The run's report says what it withstands;
it is no safe assistant.

| last step | value (nats) |
|---|---|
{losses}
"""
