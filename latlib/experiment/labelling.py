"""Replies drawn for a person to label, without saying whose they are; and the labels read back.

1. `write_sheet` draws replies of every method to the held-out harmful requests at random, has them
   written again as the audit did, mixes them, and writes `labels/replies.csv` into the folder of
   the run: id, prompt, reply, and an empty column `complied`. Which model wrote a reply, and what
   the grader calls it, stands apart in `labels/key.json`.
2. A person writes yes or no into the column. `read_labels` joins the two files.

The sheet holds replies of real models as text, which nothing else in a run's folder does: it is
written only when somebody asks for it.
"""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from latlib.config.sections import ProfileError
from latlib.data.prompts import Prompt
from latlib.evaluation.ask import prompt_set
from latlib.evaluation.examine import grader_of
from latlib.evaluation.generate import generate
from latlib.evaluation.outcomes import HARMFUL, Outcome
from latlib.io.files import aside, read_json, write_json
from latlib.text.chat import behind_thoughts

if TYPE_CHECKING:
    from latlib.experiment.run import Run

SHEET, KEY = Path("labels", "replies.csv"), Path("labels", "key.json")
COLUMNS = ("id", "prompt", "reply", "complied")
YES = {"yes", "y", "1", "true"}
NO = {"no", "n", "0", "false"}
FORMULA = ("=", "+", "-", "@")  # spreadsheets compute a cell that begins so


def write_sheet(run: Run, replies: int = 50) -> Path:
    """The sheet's path: of the one that is there, labels and all, else of a new one with `replies`
    replies of each of the profile's methods, over all seeds.

    Raises ProfileError for fewer than 2 replies.
    """
    sheet = run.folder / SHEET
    if sheet.is_file():
        return sheet
    if replies < 2:
        raise ProfileError(f"replies = {replies!r} is below 2: draw about 50 a method")
    prompts = prompt_set(HARMFUL, run.profile)
    rng = random.Random("labels")
    drawn: list[dict[str, Any]] = []
    for method in run.profile.methods:
        asked = [(seed, i) for seed in run.profile.seeds for i in range(len(prompts))]
        chosen = rng.sample(asked, min(replies, len(asked)))
        for seed in run.profile.seeds:
            numbers = [i for of_seed, i in chosen if of_seed == seed]
            drawn += _written(run, method, seed, {i: prompts[i] for i in numbers})
    rng.shuffle(drawn)
    rows = {f"r{number:04d}": row for number, row in enumerate(drawn)}
    with run.layout.locked():
        shown = [{"id": name, **row.pop("shown"), "complied": ""} for name, row in rows.items()]
        write_json(rows, run.folder / KEY)
        # not durable: the manifest would take what a person writes into it for damage
        with (
            aside(sheet, durable=False) as partial,
            partial.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.DictWriter(file, COLUMNS, quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(shown)
    return sheet


def _written(run: Run, method: str, seed: int, prompts: dict[int, Prompt]) -> list[dict[str, Any]]:
    """Replies of a model, and what the grader calls them."""
    if not prompts:
        return []
    evaluation = run.profile.evaluation
    asked = [prompt.text for prompt in prompts.values()]
    texts = generate(
        run.model(method, seed),
        asked,
        max_new_tokens=evaluation.max_new_tokens,
        system_prompt=run.profile.data.system_prompt,
        size=evaluation.batch,
    )
    answers = [behind_thoughts(text) or "" for text in texts]
    grades = grader_of(run.profile, list(prompts.values())).grade(asked, answers)
    rows = []
    for (number, prompt), text, grade in zip(prompts.items(), texts, grades, strict=True):
        row = {"method": method, "seed": seed, "prompt_id": f"{HARMFUL}-{number:04d}"}
        row |= {"cluster": str(prompt.cluster), "called": grade.outcome == Outcome.COMPLIED}
        shown = f" {text}" if text.startswith(FORMULA) else text
        rows.append({**row, "shown": {"prompt": prompt.text, "reply": shown}})
    return rows


def read_labels(run: Run) -> pd.DataFrame:
    """The labelled rows of the sheet: method, seed, prompt_id, cluster, called (by the grader) and
    complied (by the person), a row a reply. Rows without a label are left out.

    Raises ProfileError naming the file, the row and the value for an id that is not the sheet's, or
    a label that is neither yes nor no.
    """
    sheet = run.folder / SHEET
    if not sheet.is_file():
        return pd.DataFrame(
            columns=["method", "seed", "prompt_id", "cluster", "called", "complied"]
        )
    key = read_json(run.folder / KEY)
    rows = {}
    with sheet.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            name, label = row.get("id"), (row.get("complied") or "").strip().lower()
            if name not in key or name in rows:
                raise ProfileError(f"{sheet}: id = {name!r} is unknown or there twice: restore it")
            if label and label not in YES | NO:
                raise ProfileError(
                    f"{sheet}: complied = {label!r} of {name} is no label: write yes or no"
                )
            if label:
                rows[name] = {**key[name], "complied": label in YES}
    return pd.DataFrame(list(rows.values()))
