"""How often does a grader that needs no model err? Asked of replies that people have labelled.

    python benchmarks/graders.py --half untouched --json latlib/report/grader_errors.json

Every source is a folder, fetched by whoever runs this; it says which are absent:

1. `abbas2025`: `not_successes.json`, replies under ablation to AdvBench that a person called no
   success, of https://github.com/nlpet/apart-lab-refusal-lat-project (Abbas et al. 2025).
2. `xstest`: a checkout of https://github.com/paul-rottger/exaggerated-safety (Röttger et al. 2024):
   replies of five models to safe and unsafe prompts, labelled by two people. Partial refusals are
   left out: they are neither.
3. `refusal_direction`: a checkout of https://github.com/andyrdt/refusal_direction (Arditi et al.
   2024): five models' answers to harmless requests, which count as complied, whole and cut to
   CUT letters as a reply of 64 tokens is.
4. `stanford_alpaca`: a checkout of https://github.com/tatsu-lab/stanford_alpaca: the answers of its
   175 seed tasks, written by people; many are one word.

Half of the prompts is for tuning rules, the other is untouched (`half_of`): all replies to a prompt
lie in one half. The rule was fixed before any reply was read. `--show` prints the errors of the
half for tuning, and refuses to of the other. `--page` writes docs/graders.md from the figures of
the untouched half.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from measure import write

from latlib.evaluation.graders import load_grader
from latlib.evaluation.outcomes import Outcome
from latlib.report.grader_errors import error_table, kappas
from latlib.report.tables import markdown, printed

HALVES = ("tune", "untouched")
CUT = 300  # letters: about 64 tokens, as long as the replies of abbas2025
ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
TEMPLATE = Path(__file__).with_name("graders.template.md")
PAGE = ROOT / "docs" / "graders.md"


@dataclass(frozen=True)
class Labelled:
    """A reply and whether it complied. group: the model or variant that wrote it."""

    source: str
    group: str
    prompt: str
    reply: str
    complied: bool


def half_of(prompt: str) -> str:
    """'tune' or 'untouched', by a hash of the prompt."""
    digest = hashlib.sha256(prompt.strip().encode()).digest()
    return HALVES[digest[0] % 2]


def abbas2025(folder: Path) -> Iterator[Labelled]:
    """No success: by a person."""
    for row in json.loads((folder / "not_successes.json").read_text(encoding="utf-8")):
        yield Labelled("abbas2025", row["variant"], row["prompt"], row["reply"], False)


def xstest(folder: Path) -> Iterator[Labelled]:
    """Full compliance and full refusal, by two people."""
    for path in sorted(folder.glob("model_completions/xstest_v2_completions_*.csv")):
        model = path.stem.rsplit("_", 1)[1]
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row["final_label"] == "3_partial_refusal":
                    continue
                kind = "unsafe" if row["type"].startswith("contrast") else "safe"
                complied = row["final_label"] == "1_full_compliance"
                yield Labelled(f"xstest {kind}", model, row["prompt"], row["completion"], complied)


def refusal_direction(folder: Path) -> Iterator[Labelled]:
    """Answers to harmless requests, whole and cut."""
    name = "completions/harmless_baseline_completions.json"
    for path in sorted(folder.glob(f"pipeline/runs/*/{name}")):
        for row in json.loads(path.read_text(encoding="utf-8")):
            model = path.parts[-3]
            answer = Labelled("harmless", model, row["prompt"], row["response"], True)
            yield answer
            yield replace(answer, source="harmless, cut", reply=answer.reply[:CUT])


def stanford_alpaca(folder: Path) -> Iterator[Labelled]:
    """What people wrote for the seed tasks."""
    for line in (folder / "seed_tasks.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for example in row["instances"]:
            prompt = f"{row['instruction']}\n{example['input']}".strip()
            yield Labelled("harmless, by people", "people", prompt, example["output"], True)


SOURCES = (abbas2025, xstest, refusal_direction, stanford_alpaca)


def labelled_replies(data: Path, half: str) -> list[Labelled]:
    """The replies of a half. data: a folder that has one of its own for each source."""
    found: list[Labelled] = []
    for source in SOURCES:
        folder = data / source.__name__
        if folder.is_dir():
            found += [reply for reply in source(folder) if half_of(reply.prompt) == half]
        else:
            print(f"{source.__name__}: left out, there is no {folder}")
    return found


def called_complied(name: str, replies: list[Labelled]) -> list[bool]:
    """Which replies a grader calls complied."""
    prompts = [reply.prompt for reply in replies]
    grades = load_grader(name).grade(prompts, [reply.reply for reply in replies])
    return [grade.outcome == Outcome.COMPLIED for grade in grades]


def counted(replies: list[Labelled], called: list[bool]) -> list[dict]:
    """A row for each source and group: replies labelled either way, and how many of each are called
    complied.
    """
    rows: dict[tuple[str, str], dict] = {}
    for reply, complied in zip(replies, called, strict=True):
        key = (reply.source, reply.group)
        empty = {"complied": 0, "complied, called": 0, "other": 0, "other, called": 0}
        row = rows.setdefault(key, {"source": key[0], "group": key[1], **empty})
        label = "complied" if reply.complied else "other"
        row[label] += 1
        row[f"{label}, called"] += complied
    return list(rows.values())


def show_errors(name: str, replies: list[Labelled], called: list[bool]) -> None:
    """What was graded otherwise than labelled."""
    for reply, complied in zip(replies, called, strict=True):
        if complied != reply.complied:
            said = "complied" if complied else "not complied"
            print(f"\n[{name}: {said}; {reply.source}, {reply.group}] {reply.prompt[:120]!r}")
            print(repr(reply.reply[:400]))


def page() -> str:
    """docs/graders.md, from the figures of the untouched half."""
    by_writer = error_table()
    lines = {}
    for label in ("not complied", "complied"):
        table = printed(by_writer.xs(label, level="labelled")).reset_index()
        table = table.rename(columns={"group": "written by"})
        lines[label.replace(" ", "_")] = markdown(list(table), table.to_numpy().tolist())
    variants = by_writer.loc["abbas2025"].drop(columns="n").map(lambda share: share.estimate)
    spread = variants.max() - variants.min()
    points = [f"{100 * width:.0f} points for `{name}`" for name, width in spread.items()]
    agreed = [f"`{name}` {kappa:.2f}" for name, kappa in kappas("xstest").items()]
    text = TEMPLATE.read_text(encoding="utf-8")
    return text.format(cut=CUT, spread=", ".join(points), kappas=", ".join(agreed), **lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--graders", default="phrases,phrases-prefix")
    parser.add_argument("--half", choices=HALVES, default="tune")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    if options.show and options.half != "tune":
        parser.error("--show is for the half for tuning: the other half stays unread")
    if options.page:
        PAGE.write_text(page(), encoding="utf-8")
        return
    replies = labelled_replies(options.data, options.half)
    found = {}
    for name in options.graders.split(","):
        called = called_complied(name, replies)
        found[name] = counted(replies, called)
        for row in found[name]:
            print(name, *row.values())
        if options.show:
            show_errors(name, replies, called)
    write({"half": options.half, "graders": found}, options.json)


if __name__ == "__main__":
    main()
