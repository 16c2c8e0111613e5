"""The benchmarks measure the same mathematics whichever way it is computed, and count what they say
they count.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import language_model, noise_like, preference_batch, token_rows
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import directions
import lat_step
import lean
import measure
import scaling
import suffixes
import widgets
from measure import MatrixRate, Measurement, Rate, count
from naive import NaiveTrainer
from predicted import predict
from shapes import SHAPES, build, computing_in, rows, train_settings
from switches import POINTS, WRAPPERS, SwitchedTrainer
from variants import Bench, choose

from latlib import losses
from latlib.attack import attack_losses
from latlib.batch import TokenRow, collate
from latlib.config.sections import AttackSettings, DefenceSettings, TrainSettings
from latlib.io.files import json_ready
from latlib.planning.step_cost import StepCounter
from latlib.redteam.gcg import SuffixSettings
from latlib.threat import PGD, depth
from latlib.train import Trainer

KINDS = ("stock", "lean")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_square(monkeypatch):
    """The matrix rate is not what is tested."""
    monkeypatch.setitem(measure.SQUARE, "cpu", 256)


def settings_for(rule="l2", rows=4, **changes) -> TrainSettings:
    attack = AttackSettings(
        sites=("embedding", 1, 2), eps=1.5, steps=3, rule=rule, lr=0.1 if rule == "adamw" else None
    )
    defence = DefenceSettings(toward=0.5, away=0.4, kl=0.3, sft=0.2)
    plain = dict(
        steps=3,
        batch=rows,
        benign_batch=rows,
        micro_batch=3,
        lr=1e-2,
        lr_warmup=0,
        lr_decay_share=0.0,
    )
    return TrainSettings(**{**plain, "clip": 0.05, "attack": attack, "defence": defence, **changes})


def trainer_for(kind, off=(), rows=4, tied=False, **changes) -> SwitchedTrainer:
    lm = language_model(kind, trained=True, tie_word_embeddings=tied)
    return SwitchedTrainer(
        lm, token_rows(rows, 2), token_rows(rows, 1), settings_for(rows=rows, **changes), 0, off=off
    )


def adapter_of(model) -> list:
    return [p.detach() for n, p in model.named_parameters() if "lora_" in n]


def assert_equal_steps(one, other, steps=1):
    """Same metrics, gradients and adapter, step by step."""
    for _ in range(steps):
        assert other.train_step() == pytest.approx(one.train_step(), abs=1e-9)
        for a, b in zip(one.parameters, other.parameters, strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=1e-10)
            torch.testing.assert_close(b.detach(), a.detach(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["adamw", "l2", "sign"])
def test_naive_equals_the_engine(rule, kind):
    settings, data = settings_for(rule, rows=5), (token_rows(5, 2), token_rows(5, 1))
    lm = language_model(kind, trained=True)
    engine = Trainer(lm, *data, settings, seed=3)
    naive = NaiveTrainer(
        language_model("stock", trained=True).model,
        *data,
        settings,
        3,
        settings.attack.threat_model(lm.n_layers).radius,
    )
    for _ in range(2):
        assert naive.train_step() == pytest.approx(engine.train_step()["total"], abs=1e-9)
        for a, b in zip(engine.parameters, naive.parameters, strict=True):
            torch.testing.assert_close(b.detach(), a.detach(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("off", [*((point,) for point in POINTS), POINTS], ids="-".join)
@pytest.mark.parametrize(
    "change", [{}, {"pad_to": 16}, {"micro_batch": 1}, {"tied": True}], ids=str
)
def test_every_point_is_worth_nothing_but_time(change, off, kind):
    assert_equal_steps(trainer_for(kind, **change), trainer_for(kind, off, **change))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_one_row(kind):
    assert_equal_steps(trainer_for(kind, rows=1), trainer_for(kind, POINTS, rows=1), steps=2)


def test_points_under_gradient_checkpointing():
    one, other = trainer_for("stock"), trainer_for("stock", POINTS)
    other.lm.model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    other.lm.model.train()
    assert_equal_steps(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shared_forward_is_the_same_step(kind):
    assert_equal_steps(trainer_for(kind), trainer_for(kind, shared_forward=True))


@pytest.mark.parametrize("kind", KINDS)
def test_tied_embeddings_give_the_lean_and_the_stock_forward_the_same_step(kind):
    assert_equal_steps(trainer_for("stock", tied=True), trainer_for(kind, tied=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("point", WRAPPERS)
def test_wrappers_give_the_same_losses_and_gradients_of_delta(point, kind):
    network, batch = language_model(kind, trained=True).network(train=True), preference_batch(4)
    found = []
    for each in (network.frozen(), WRAPPERS[point](network).frozen()):
        deltas = {site: delta.requires_grad_() for site, delta in noise_like(batch, (1, 2)).items()}
        start = (1, each.capture(batch, [1])[1])
        rows = each.label_rows(batch, deltas, start)
        values = attack_losses(each, batch, PGD(), rows)
        found.append((values, *torch.autograd.grad(values.sum(), list(deltas.values()))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_separate_rows_are_the_packed_row_at_every_position(kind):
    network, batch = language_model(kind, trained=True).network(), preference_batch(4)
    separate, real = WRAPPERS["packing"](network), batch.segments >= 0
    deltas = noise_like(batch, ("embedding", 2))
    torch.testing.assert_close(
        separate.hidden(batch, deltas)[real], network.hidden(batch, deltas)[real]
    )
    for site, stream in network.capture(batch, (0, 2)).items():
        torch.testing.assert_close(separate.capture(batch, (0, 2))[site][real], stream[real])
    logits = WRAPPERS["labels"](network).hidden(batch, deltas)
    torch.testing.assert_close(logits[real], network.unembed(network.hidden(batch, deltas)[real]))


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_near_float32(kind):
    """2 % of the total: bf16 keeps 8 bits, and the losses of 60 tokens average its rounding out."""
    shape, totals = SHAPES["smoke"], []
    data, settings = (
        (rows(shape, shape.batch, 2), rows(shape, shape.batch, 1)),
        train_settings(shape),
    )
    for dtype, off in ((torch.float32, ()), (torch.bfloat16, ()), (torch.bfloat16, POINTS)):
        lm = build(shape, torch.float32 if kind == "lean" else dtype, CPU)
        totals.append(
            SwitchedTrainer(
                computing_in(lm, dtype, kind), *data, settings, 0, off=off
            ).train_step()["total"]
        )
    assert totals == pytest.approx([totals[0]] * 3, rel=0.02)


def test_an_attack_with_weight_gradients_computes_them_and_leaves_none():
    plain, other = trainer_for("stock"), trainer_for("stock", ("frozen",))
    flops = []
    for trainer in (plain, other):
        generator = torch.Generator().manual_seed(0)
        network = trainer.lm.network(train=True)
        part = trainer._micro_batches(True, generator)[0]
        with StepCounter() as counter:
            trainer._attack(network.frozen(), part)
        flops.append(counter.flop)
        assert all(p.grad is None for p in trainer.parameters)
    asked = other.lm.network(train=True).trained()
    assert len(asked) == len(other.parameters) and flops[1] > 1.1 * flops[0]


def test_points_that_are_off_cost_flops():
    """Each of the first four points saves arithmetic; together they are naive's share of it."""
    shape, flops = SHAPES["smoke"], {}
    bench = Bench(shape, CPU)
    for variant in choose("naive,engine,alone,path", lean=True):
        flops[variant.name] = count(bench.step(bench.trainer(variant, torch.float32)), CPU).flop
    for point in ("packing", "start", "labels", "frozen"):
        assert flops[f"{point} off"] > flops["engine"]
    assert flops["all points off"] == pytest.approx(flops["naive"], rel=0.1)
    path = [
        flops[name] for name in ("all points off", "+ packing", "+ start", "+ labels", "+ frozen")
    ]
    assert path == sorted(path, reverse=True)


def wide_trainer(kind, off=()):
    """Two blocks, a small stream and Llama 3's vocabulary."""
    shape = SHAPES["smoke"]
    config = dict(
        d_model=8, layers=2, heads=2, kv_heads=1, ffn=16, vocabulary=128_256, batch=2, sites=(0,)
    )
    shape = type(shape)(**{**vars(shape), **config, "prompts": (18, 22), "completions": (7, 9)})
    bench = Bench(shape, CPU)
    variant = choose("engine", lean=False)[0]
    return bench, bench.trainer(type(variant)("one", off=off, forward=kind), torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_no_allocation_is_as_large_as_tokens_times_vocabulary(kind, monkeypatch):
    """A whole step: attack, judging, defence, KL, backward. The chunk is fewer rows than there are
    labels.
    """
    vocabulary, chunk = 128_256, 8  # the output matrix itself is 8 rows' worth
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk * vocabulary)
    largest = {}
    for off in ((), ("labels",)):
        bench, trainer = wide_trainer(kind, off)
        _ = trainer.lm.paths  # the proof is not a step
        assert (
            min(
                len(part.attacked.labels)
                for part in trainer._micro_batches(True, torch.Generator())
            )
            > chunk
        )
        largest[off] = count(bench.step(trainer), CPU).largest
    assert largest[()][0] <= chunk * vocabulary
    # and the trace would have shown it
    assert largest[("labels",)][0] >= bench.harmful[0].length * vocabulary


def test_a_run_is_compared_with_the_rates_around_it():
    found, slow, fast = Measurement(), Rate(10.0, 10.0, 5.0), Rate(30.0, 30.0, 15.0)
    found.add(2.0, slow, fast)
    found.add(1.0, fast, fast)
    found.add(4.0, slow, slow)
    assert found.median == 2.0 and found.rate("best") == 20.0
    assert found.fraction(20, "best") == pytest.approx(0.5)
    rate = MatrixRate([(8, 16, 8), (8, 8, 8)], torch.float32, CPU, seconds=0.0).measure()
    assert rate.best >= rate.square and rate.best >= rate.own > 0


@pytest.mark.parametrize("naive", [False, True])
def test_a_step_without_data_predicts_what_a_step_takes(naive):
    """Everything but attention's own buffers and the judge's forward is as on the CPU."""
    shape = SHAPES["smoke"]
    found = predict(shape, torch.float32, naive)
    bench = Bench(shape, CPU)
    variant = choose("naive" if naive else "stock modules", lean=True)[0]
    trainer = bench.trainer(variant, torch.float32)
    bench.step(trainer)()  # the moments are there
    real = count(bench.step(trainer), CPU)
    model = bench.language_model(variant, torch.float32).model
    parameters = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    adapter = sum(p.numel() for p in adapter_of(model))
    assert found["weights_bytes"] == 4 * (2 * parameters + adapter if naive else parameters)
    assert (found["adapter_bytes"], found["optimiser_bytes"]) == (4 * adapter, 8 * adapter)
    assert found["flop"] == pytest.approx(real.flop, rel=0.1)
    assert found["peak_bytes"] == pytest.approx(real.peak, rel=0.35)


def test_lat_step_end_to_end(tmp_path, capsys):
    out = tmp_path / "deep" / "out.json"
    arguments = ["--shape", "smoke", "--device", "cpu", "--repeats", "1", "--json", str(out)]
    lat_step.main(
        [*arguments, "--variants", "naive,engine,equal,packing off", "--dtype", "float32,bfloat16"]
    )
    found = json.loads(out.read_text())
    assert "engine (lean)" in capsys.readouterr().out
    assert {"cpu", "threads", "torch", "commit", "date"} <= set(found["environment"])
    assert len(found["results"]) == 8 and not any(r["error"] for r in found["results"])
    for record in found["results"]:
        assert record["seconds"]["median"] > 0 and len(record["seconds"]["samples"]) == 1
        assert (
            0 < record["fraction_of_best"] < 1 and record["peak_bytes"] > 0 and record["flop"] > 0
        )
        assert record["total_loss"] == pytest.approx(found["results"][0]["total_loss"], rel=0.02)
    first = {r["variant"]: r for r in found["results"][:4]}
    assert first["naive"]["speedup_on_naive"] == 1 and first["engine"]["seconds_on_engine"] == 1
    # the second copy, and the moments
    assert first["naive"]["held_bytes"] > first["naive"]["weights_bytes"]


def test_lean_takes_the_same_step_by_both_forwards(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lean, "SIZES", {"one": (16, 2, 4, 2, 24, 61), "two": (32, 2, 4, 2, 24, 61)})
    monkeypatch.setattr(lean, "SHAPES", {"cpu": SHAPES["smoke"]})
    out = tmp_path / "lean.json"
    lean.main(["--json", str(out), "--repeats", "1", "--device", "cpu"])
    found = json.loads(out.read_text())
    one, two = found["results"]
    assert (one["size"], two["size"]) == ("one", "two") and one["parameters"] < two["parameters"]
    for record in found["results"]:
        seconds, totals = record["seconds"], record["total_loss"]
        assert record["stock_on_lean"] == seconds["stock"] / seconds["lean"] > 0
        assert totals["lean"] == pytest.approx(totals["stock"], rel=1e-5)
    assert "two: 0M parameters, stock" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        lean.main(["--sizes", "huge"])
    assert "no size 'huge', choose from one, two" in capsys.readouterr().err


def test_a_variant_that_runs_out_of_memory_leaves_the_others(monkeypatch, capsys):
    own = SwitchedTrainer.train_step

    def step(self):
        if "labels" in self.off:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 60 GiB")
        return own(self)

    monkeypatch.setattr(SwitchedTrainer, "train_step", step)
    arguments = ["--shape", "smoke", "--device", "cpu", "--repeats", "1", "--dtype", "float32"]
    found = lat_step.main([*arguments, "--variants", "engine,labels off"])["results"]
    assert found[0]["error"] is None and "60 GiB" in found[1]["error"]
    assert "out of memory" in capsys.readouterr().out


def test_a_config_file_and_a_wrong_name(tmp_path):
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    config.save_pretrained(tmp_path)
    arguments = [
        "--shape",
        "smoke",
        "--config",
        str(tmp_path / "config.json"),
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    found = lat_step.main([*arguments, "--meta"])
    assert (found["shape"]["layers"], found["shape"]["vocabulary"]) == (3, 97)
    assert [r["variant"] for r in found["predicted"]] == ["naive", "engine"]
    with pytest.raises(ValueError, match="no variant 'fast'"):
        lat_step.main(
            [
                "--shape",
                "smoke",
                "--device",
                "cpu",
                "--dtype",
                "float32",
                "--variants",
                "engine,fast",
            ]
        )


def test_scaling_end_to_end(tmp_path):
    arguments = [
        "--shape",
        "smoke",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--repeats",
        "1",
        "--quick",
    ]
    scaling.main(
        [*arguments, "--json", str(tmp_path / "out.json"), "--figure", str(tmp_path / "out.png")]
    )
    found = json.loads((tmp_path / "out.json").read_text())
    assert {p["variable"] for p in found["points"]} == set(scaling.AXES)
    assert all(p["seconds"] > 0 and p["peak_bytes"] > 0 for p in found["points"])
    assert (
        set(found["fits"]) == {"completion", "batch", "steps"} and "R squared" in found["caption"]
    )
    added = found["added_pgd_step"]
    assert added["blocks_below_first_site"] == depth(1) and added["bound"] == pytest.approx(
        1.1 * 0.5
    )
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_random_rows_have_the_lengths_of_their_shape():
    shape = SHAPES["cpu"]
    found = rows(shape, 40, 2)
    assert found == rows(shape, 40, 2) != rows(shape, 40, 2, seed=1)
    assert all(
        64 <= len(r.prompt) <= 128 and all(32 <= len(c) <= 96 for c in r.completions) for r in found
    )
    assert isinstance(found[0], TokenRow) and collate(found[:2]).packed


def test_directions_are_timed_beside_a_plain_forward(tmp_path):
    arguments = [
        "--shape",
        "smoke",
        "--dtype",
        "float32",
        "--prompts",
        "6",
        "--size",
        "3",
        "--repeats",
        "3",
    ]
    out = directions.main([*arguments, "--json", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text()) == json_ready(out)
    (record,) = out["results"]
    plain, found = record["seconds"]["plain"], record["seconds"]["directions"]
    assert (
        len(plain) == len(found) == 3
        and record["ratio"] == sorted(f / p for f, p in zip(found, plain))[1]
    )


def test_both_suffix_searches_ask_the_same_prompts_as_often(smoke_run, tmp_path, monkeypatch):
    monkeypatch.setattr(suffixes, "BUDGETS", (1,))
    monkeypatch.setattr(suffixes, "SETTINGS", SuffixSettings(n_tokens=2, candidates=3, topk=4))
    arguments = [
        "--run",
        str(smoke_run.folder),
        "--prompts",
        "4",
        "--json",
        str(tmp_path / "out.json"),
    ]
    out = suffixes.main(arguments)
    assert json.loads((tmp_path / "out.json").read_text()) == json_ready(out)
    (record,) = out["results"]
    assert record["queries"] == 1 + 1 * (3 + 1) and record["n"] == 4
    assert (
        record["asr"]["gcg"]["n"] == record["asr"]["random"]["n"] == record["difference"]["n"] == 4
    )
    gap = record["asr"]["gcg"]["estimate"] - record["asr"]["random"]["estimate"]
    assert record["difference"]["estimate"] == pytest.approx(gap)


def test_every_control_of_a_widget_is_moved_alone(smoke_run, tmp_path, monkeypatch):
    made = {}

    def spied(name, make):
        def kept(run):
            widget = make(run)
            calls, tell = [dict(widget.kwargs)], widget.f
            made[name] = calls
            widget.f = lambda **chosen: (calls.append(chosen), tell(**chosen))[1]
            return widget

        return kept

    monkeypatch.setenv("LATLIB_BATCH", "1")  # under which there would be no widget
    makers = {name: spied(name, make) for name, make in widgets.MAKERS.items()}
    monkeypatch.setattr(widgets, "MAKERS", makers)
    file = tmp_path / "out.json"
    out = widgets.main(["--run", str(smoke_run.folder), "--json", str(file)])
    assert json.loads(file.read_text()) == json_ready(out)
    moved = {"attack (00, 02)": {"prompt", "eps"}}
    moved["direction (04)"] = {"target", "mode", "vector", "rule", "strength", "prompt"}
    moved["encoding (05)"] = {"prompt", "encoding", "strength"}
    for name, (usual, *calls) in made.items():
        changed = [{key for key in usual if call[key] != usual[key]} for call in calls]
        assert all(len(keys) == 1 for keys in changed)
        assert set().union(*changed) == moved[name]
        assert len(out["results"][name]["seconds"]) == len(calls)
