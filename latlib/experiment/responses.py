"""What the frozen base replies to benign prompts that come without a response
(`data.benign_responses: base`).

1. Before anything else of a run is made, every such prompt is asked once: greedily,
   `evaluation.batch` prompts at a time, for at most `data.response_tokens` tokens and never for
   more than `data.max_tokens` leaves.
2. After every batch the replies so far are put on the disk. Whoever was stopped or killed goes on
   behind them, in the same batches.
3. The finished file lies in the run folder with a checksum, and all methods and seeds have the
   same. What becomes of a reply that the limit cut, and of an empty one, `latlib.data.splits` says.
   One whose text is no row of these limits is kept as an empty one.
"""

from __future__ import annotations

from dataclasses import replace

from latlib.batch import TokenRow
from latlib.config.sections import DataSettings, ProfileError
from latlib.data.splits import file_prompts
from latlib.evaluation.generate import Reply, of_similar_length, replies
from latlib.evaluation.outcomes import BASE
from latlib.experiment.layout import Layout
from latlib.experiment.spec import Spec
from latlib.io.files import read_json, write_json
from latlib.io.progress import OnStep, Stopped, saving_on_signals, stop_requested
from latlib.models import LanguageModel, load_model
from latlib.text.chat import UNBOUNDED, Row, tokenise

PARTIAL = ".partial.json"  # beside the finished file


def make_responses(layout: Layout, on_step: OnStep) -> None:
    """Ask the base of a run, or what is left to ask, and keep what it replies. on_step(step, total,
    detail) reports progress.

    Raises `Stopped` where somebody asked for it, with everything saved; ProfileError for a training
    prompt that leaves no room for a response, where data.too_long is 'error'.
    """
    profile, data, file = layout.profile, layout.profile.data, layout.profile.data.answers
    if file is None or not layout.lacks_responses():  # made by another command meanwhile
        return
    lm = load_model(layout.model_folder(Spec(BASE, profile.seeds[0])), profile.model)
    limit = min(data.max_tokens, lm.context)
    asked = _asked(data, lm, limit)
    partial = file.with_name(PARTIAL)
    found = read_json(partial) if partial.is_file() else {}
    lengths = [tokens.length for _, tokens in asked]
    with saving_on_signals():
        for index in of_similar_length(lengths, profile.evaluation.batch):
            rows, batch = zip(*(asked[i] for i in index), strict=True)
            if rows[-1].row_id in found:
                continue
            most = min(data.response_tokens, limit - lengths[index[-1]])
            for row, reply in zip(rows, replies(lm, batch, size=len(batch), max_new_tokens=most)):
                found[row.row_id] = _readable(row, reply, lm, data, limit)
            write_json(found, partial)
            on_step(len(found), len(asked), "")
            if stop_requested(layout.folder):
                raise Stopped(f"the base has answered {len(found)} of {len(asked)} prompts; saved")
    write_json(found, file)
    partial.unlink(missing_ok=True)


def _asked(data: DataSettings, lm: LanguageModel, limit: int) -> list[tuple[Row, TokenRow]]:
    """Every benign prompt without a response that leaves room for one, as text and as tokens."""
    prompts = [prompt for prompt in file_prompts(data)["benign"] if not prompt.completions[0]]
    rows = [Row(prompt.row_id, prompt.prompt, ()) for prompt in prompts]
    every = tokenise(rows, lm.tokenizer, UNBOUNDED, data.system_prompt)
    found = []
    for prompt, row, tokens in zip(prompts, rows, every, strict=True):
        if tokens.length < limit:
            found.append((row, tokens))
        elif data.too_long == "error" and prompt.split == "train":
            raise ProfileError(
                f"{prompt.place} has {tokens.length} tokens and leaves no room for a response"
                f" within data.max_tokens = {limit}: shorten it, raise data.max_tokens, or set"
                " data.too_long"
            )
    return found


def _readable(
    row: Row, reply: Reply, lm: LanguageModel, data: DataSettings, limit: int
) -> tuple[str, bool]:
    """The reply and whether it ended; without its last words where the row cannot be read with
    them."""
    text, ended = reply.text, reply.ended
    while text and not _can_be_read(
        replace(row, completions=(text,), ended=ended), lm, data, limit
    ):
        text, ended = text.rpartition(" ")[0].rstrip(), False
    return text, ended


def _can_be_read(row: Row, lm: LanguageModel, data: DataSettings, limit: int) -> bool:
    """Whether a row with its reply has tokens that go on from the prompt's, and room for them: an
    empty reply has none, and bytes that are no text become more of them.
    """
    try:
        tokenise([row], lm.tokenizer, limit, data.system_prompt)
    except ValueError:
        return False
    return True
