"""Adversarial suffixes by GCG: a text behind a request that makes a model write a given reply; and
random search.

One suffix of n tokens is sought for all prompts at once (universal); a list of one prompt is the
individual attack. The loss is the mean over prompts of the mean cross-entropy, in nats, of the
target's tokens.
1. The prompt's ids are cut round the suffix: [before | suffix | behind | target] (`Frames`). The
   first suffix is a neutral text.
2. The loss's gradient at the suffix's embeddings, times the embedding of every token, is to first
   order what each substitution does; the `topk` best of each position are kept (`SuffixLoss`).
3. Candidates replace `n_replace` random positions by random tokens of these. What decoding, chat
   template and tokenizer do not give back unchanged is a text nobody could send: it is filtered,
   and another is drawn.
4. Each candidate is run with each prompt, `batch` rows at a time, half as many whenever memory runs
   out. Hugging Face models run the tokens before the suffix once (key-value cache); the lean
   forward of very small models each time.
5. The best candidate that survives behind every prompt enters a buffer of the best suffixes, and 2
   goes on from there.

`by_gradient=False` is random search, the gradient-free control: without 2, any allowed token in 3,
and one more candidate a step, for as many queries. A query is one suffix with one prompt run
forward; a gradient pass counts as one for each of its prompts. Source: Zou et al. 2023 (arXiv
2307.15043), algorithms 1 and 2; here with all prompts from the start, and a buffer.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import compress, cycle, islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor
from transformers import DynamicCache

from latlib.batch import Batch, TokenRow, collate
from latlib.config.sections import Count, Natural
from latlib.evaluation.phrases import Texts
from latlib.io.files import Json, read_json, write_json
from latlib.io.progress import OnStep, unseen
from latlib.losses import at_labels, row_means, token_losses, wide_of
from latlib.models import LanguageModel
from latlib.text.chat import Row, chat_text, shared_end, shared_start, token_ids, tokenise
from latlib.threat import EMBEDDING

Ids = tuple[int, ...]

DRAWS = 12  # until enough candidates survive
DRAWS_AT_WIDTH = 4  # after every so many, topk doubles
# relative: how far the first suffix's losses on one device may be from those on another. Our choice
SAME_LOSS = 0.01


class OtherSearchError(ValueError):
    """A file holds how far another search is, or nothing that can be read."""


@checked_dataclass(frozen=True)
class SuffixSettings:
    """How a suffix is sought. Raises ValueError naming the field, the value and what it must be.

    Defaults are Zou et al.'s where they have one (docs/sources.md).
    """

    n_tokens: Count = 20
    steps: Natural = 500
    by_gradient: bool = True  # False: random search
    candidates: Count = 512  # B of Zou et al.
    topk: Count = 256  # k of Zou et al.; no more than there are allowed tokens
    n_replace: Count = 1
    # A step starts from the best kept suffix that no step has started from, else from the best: 1
    # takes improvements only, as many as there are steps always moves on (Zou et al.). Our choice:
    # 3 did as well on an organism, and can turn back.
    buffer: Count = 3
    # prompts drawn for a step's gradient and candidates; 0 is all, as in Zou et al.
    prompts_per_step: Natural = 0
    batch: Count = 64  # rows at a time, to begin with
    # '' is '! ! ! ...' (Zou et al.), or the first token whose repetition survives where that
    # doesn't
    initial: str = ""
    separator: str = " "  # between prompt and suffix
    # the target ends the reply; False for a beginning ('Sure, here is', Zou et al.)
    whole_reply: bool = True
    allow_non_ascii: bool = False
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        if self.n_replace > self.n_tokens:
            raise ValueError(
                f"n_replace = {self.n_replace} is more than n_tokens = {self.n_tokens}: lower it"
            )


@dataclass(frozen=True)
class Suffix:
    """What a search found. text: without the separator. token_ids: [n_tokens], as tokenised behind
    every prompt. loss: over all prompts, nats per target token. losses: [steps], the best after
    each. queries: see the module's docstring. batch: rows at a time that fitted into memory."""

    text: str
    token_ids: Ids
    loss: float
    losses: tuple[float, ...]
    queries: int
    batch: int
    separator: str

    def behind(self, prompt: str) -> str:
        """The user message: prompt, separator, suffix."""
        return prompt + self.separator + self.text


def gcg(
    lm: LanguageModel,
    prompts: Texts,
    targets: Texts,
    settings: SuffixSettings,
    seed: int,
    on_step: OnStep = unseen,
    file: Path | None = None,
) -> Suffix:
    """Seek one suffix under which the model writes each prompt's target; see the module's
    docstring.

    on_step: called after every step. file: where the search writes, after every step, how far it
    is; where it is there already, the search goes on from it and ends the same. Deleting it is the
    caller's. Raises ValueError for input that cannot be used, OtherSearchError for a file of
    another search, RuntimeError when not even one row fits into memory. Weights, their gradients
    and flags stay as they are.
    """
    return _Search(SuffixLoss(lm, prompts, targets, settings), seed).run(on_step, file)


class _Search:
    """A search and how far it is. kept: suffix -> loss, best first. started: suffixes that a step
    has started from. losses: the best after each step. first: [prompts], the losses
    before all steps."""

    def __init__(self, objective: SuffixLoss, seed: int) -> None:
        self.objective = objective
        self.seed = seed
        first, everyone = objective.initial, range(len(objective.targets))
        self.first = objective.losses([first], everyone)[0]
        self.kept: dict[Ids, float] = {first: self.first.mean().item()}
        self.started: set[Ids] = set()
        self.losses: list[float] = []
        self.queries = len(everyone)

    def run(self, on_step: OnStep, file: Path | None) -> Suffix:
        """Take all steps, or those that are left."""
        settings = self.objective.settings
        if file is not None and file.is_file():
            self._go_on_from(file)
        for step in range(len(self.losses), settings.steps):
            self._step(step)
            if file is not None:
                write_json(self._state(), file)
            on_step(step + 1, settings.steps, f"loss {self.losses[-1]:.3f}")
        best, loss = next(iter(self.kept.items()))
        text, losses = self.objective.frames.text(best), tuple(self.losses)
        batch, separator = self.objective.batch, settings.separator
        return Suffix(text, best, loss, losses, self.queries, batch, separator)

    def _step(self, step: int) -> None:
        objective, kept = self.objective, self.kept
        fresh = [ids for ids in kept if ids not in self.started]
        origin = [*fresh, *kept][0]
        self.started.add(origin)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        found, loss, spent = _best_near(objective, origin, generator)
        self.queries += spent
        kept[found] = loss
        by_loss = sorted(kept, key=kept.__getitem__)
        self.kept = {ids: kept[ids] for ids in by_loss[: objective.settings.buffer]}
        self.losses.append(kept[by_loss[0]])

    def _state(self) -> Json:
        return {
            "search": self._digest(),
            "first": self.first,
            "kept": list(self.kept.items()),
            "started": sorted(self.started),
            "losses": self.losses,
            "queries": self.queries,
            "batch": self.objective.batch,
        }

    def _digest(self) -> str:
        """What tells this search from others on one model."""
        objective = self.objective
        asked = (objective.frames.around, objective.targets, objective.settings)
        return hashlib.sha256(repr((*asked, self.seed)).encode()).hexdigest()

    def _go_on_from(self, file: Path) -> None:
        objective = self.objective
        try:
            state = read_json(file)
            first = torch.tensor(state["first"], dtype=self.first.dtype, device=self.first.device)
            same_model = first.isclose(self.first, rtol=SAME_LOSS, atol=0.0).all()
            is_mine = state["search"] == self._digest() and bool(same_model)
        except (ValueError, TypeError, KeyError, RuntimeError):
            is_mine = False
        if not is_mine:
            raise OtherSearchError(f"{file} is of another search: delete it, or give another file")
        self.losses = state["losses"]
        self.queries = state["queries"]
        objective.batch = min(objective.batch, state["batch"])  # memory had run out
        self.started = set(map(tuple, state["started"]))
        self.kept = {}
        for ids, loss in state["kept"]:
            # JSON has no infinity: the loss of what does not survive
            self.kept[tuple(ids)] = math.inf if loss is None else loss


def _best_near(
    objective: SuffixLoss, origin: Ids, generator: torch.Generator
) -> tuple[Ids, float, int]:
    """(the best candidate near `origin`, its loss over all prompts, queries)."""
    settings, frames = objective.settings, objective.frames
    order = torch.randperm(len(frames.around), generator=generator).tolist()
    some = settings.prompts_per_step or len(order)
    drawn, others = sorted(order[:some]), sorted(order[some:])
    if settings.by_gradient:
        tokens, width = objective.ranked(origin, drawn), settings.topk
        count = settings.candidates
    else:
        tokens, width = frames.allowed.expand(len(origin), -1), len(frames.allowed)
        count = settings.candidates + 1  # instead of the gradient pass
    candidates = _candidates(frames, origin, tokens, width, count, generator)
    losses = objective.losses(candidates, drawn)
    by_loss = losses.mean(1).argsort(stable=True).tolist()
    best = next((i for i in by_loss if frames.survives(candidates[i])), None)
    winner = by_loss[0] if best is None else best
    over_all = losses[winner]
    if others:
        rest = objective.losses([candidates[winner]], others)
        over_all = torch.cat((over_all, rest[0]))
    # what does not survive has an infinite loss: it may be started from, and is never the best
    loss = math.inf if best is None else over_all.mean().item()
    return candidates[winner], loss, len(drawn) * (settings.candidates + 1) + len(others)


def _candidates(
    frames: Frames,
    origin: Ids,
    tokens: Tensor,
    width: int,
    count: int,
    generator: torch.Generator,
) -> list[Ids]:
    """`count` suffixes near `origin` that survive behind the first prompt, from the first `width`
    of each position's `tokens` ([n_tokens, allowed]) or more where too few survive; then repeated,
    for the number of queries is a promise."""
    found: dict[Ids, None] = {}  # in the order in which they were drawn
    for draw in range(DRAWS):
        choice = tokens[:, : width << draw // DRAWS_AT_WIDTH]
        drawn = _substituted(origin, choice, 2 * count, frames.settings.n_replace, generator)
        fresh = [ids for ids in dict.fromkeys(drawn) if ids not in found and ids != origin]
        found |= dict.fromkeys(compress(fresh, frames.survive(fresh, 0)))
        if len(found) >= count:
            break
    return list(islice(cycle(found or [origin]), count))


def _substituted(
    origin: Ids, choice: Tensor, n: int, n_replace: int, generator: torch.Generator
) -> list[Ids]:
    """n suffixes that differ from `origin` at `n_replace` random positions, by one of the tokens
    that are the position's `choice` ([n_tokens, columns])."""
    keys = torch.rand(n, len(origin), generator=generator)
    places = keys.argsort(1)[:, :n_replace]  # [n, n_replace], different ones in a row
    columns = torch.randint(choice.shape[1], places.shape, generator=generator)
    suffixes = torch.tensor(origin).repeat(n, 1)
    suffixes.scatter_(1, places, choice[places, columns])
    return [tuple(ids) for ids in suffixes.tolist()]


class Frames:
    """Where a suffix stands in the chat of each prompt, as token ids; prompts are named by their
    number.

    ahead: each prompt with the separator. around: for each the ids before the suffix, and those
    behind it. allowed: [allowed] ids that a suffix may consist of.
    """

    def __init__(self, lm: LanguageModel, prompts: Texts, settings: SuffixSettings) -> None:
        self.tokenizer = lm.tokenizer
        self.settings = settings
        self.ahead = [prompt + settings.separator for prompt in prompts]
        self.around = [self._cut(ahead) for ahead in self.ahead]
        self.allowed = self._allowed(len(lm.model.get_input_embeddings().weight))

    def text(self, ids: Ids) -> str:
        """A suffix's ids as text, without the separator that its first token may hold."""
        text: str = self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return text.removeprefix(self.settings.separator)

    def ids(self, prompt: int, suffix: Ids) -> Ids:
        """[before | suffix | behind]."""
        before, behind = self.around[prompt]
        return (*before, *suffix, *behind)

    def survive(self, suffixes: Sequence[Ids], prompt: int) -> list[bool]:
        """Whether each suffix, as text behind a prompt, is tokenised with the whole chat to its own
        ids.
        """
        tokens = self._tokens([self.ahead[prompt] + self.text(suffix) for suffix in suffixes])
        pairs = zip(tokens, suffixes, strict=True)
        return [found == self.ids(prompt, suffix) for found, suffix in pairs]

    def survives(self, suffix: Ids) -> bool:
        """Whether a suffix survives behind every prompt; most that do not fail at the first."""
        return all(self.survive([suffix], prompt)[0] for prompt in range(len(self.ahead)))

    def initial(self) -> Ids:
        """The suffix that a search starts from. Raises ValueError when it does not survive."""
        n, text = self.settings.n_tokens, self.settings.initial
        if not text:
            options = self._neutral(n)
        else:
            (ids,) = self._tokens([self.ahead[0] + text])
            before, behind = self.around[0]
            options = [ids[len(before) : len(ids) - len(behind)]]
        for ids in options:
            if len(ids) == n and self.survives(ids):
                return ids
        have = f"{len(options[0])} tokens, or not the same ones behind every prompt"
        raise ValueError(f"initial = {text!r} is {have}: give n_tokens = {n} that stay the same")

    def _neutral(self, n: int) -> list[Ids]:
        """Repetitions of each allowed token, '!' first."""
        texts = {i: self.text((i,)).strip() for i in self.allowed.tolist()}
        tokens = sorted(filter(texts.get, texts), key=lambda i: texts[i] != "!")
        return [(i,) * n for i in tokens]

    def _tokens(self, messages: Texts) -> list[Ids]:
        system = self.settings.system_prompt
        chats = [chat_text(self.tokenizer, message, system) for message in messages]
        return token_ids(self.tokenizer, chats)

    def _cut(self, ahead: str) -> tuple[Ids, Ids]:
        """Ids before and behind a suffix: what two chats that differ in it have in common. A
        separator that is a token of its own is before.
        """
        if ahead + "a" not in chat_text(self.tokenizer, ahead + "a"):
            prompt = ahead.removesuffix(self.settings.separator)
            raise ValueError(
                f"prompt {prompt!r}: the chat template changes it: remove white space at its ends"
            )
        # they merge with no neighbour
        first, second = "ab" if self.settings.separator else "!?"
        a, b = self._tokens([ahead + first, ahead + second])
        return a[: shared_start(a, b)], a[len(a) - shared_end(a, b) :]

    def _allowed(self, embedded: int) -> Tensor:
        """[allowed] ids of printable tokens, none of the added ones, which mark turns."""
        added = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        single = [[i] for i in range(min(len(self.tokenizer), embedded)) if i not in added]
        texts = self.tokenizer.batch_decode(single, clean_up_tokenization_spaces=False)
        found = []
        for (i,), text in zip(single, texts, strict=True):
            readable = text.isascii() or self.settings.allow_non_ascii
            # what cannot be decoded alone is a part of a character
            if text and text.isprintable() and readable and "\ufffd" not in text:
                found.append(i)
        return torch.tensor(found)


class SuffixLoss:
    """The loss of suffixes on a model, and its gradient.

    targets: of each prompt, the ids of its one completion. embeddings: [allowed, d_model], what the
    first block reads for each token, whatever the model makes of its embeddings. cached: whether
    the tokens before the suffix are run once, which changes nothing but rounding. batch: rows at a
    time, fewer once memory has run out.
    """

    def __init__(
        self, lm: LanguageModel, prompts: Texts, targets: Texts, settings: SuffixSettings
    ) -> None:
        texts = isinstance(prompts, str) or isinstance(targets, str)
        if texts or not prompts or len(prompts) != len(targets):
            raise ValueError(
                f"{len(prompts)} prompts, {len(targets)} targets: give two lists of one length, 1"
                " or more"
            )
        self.settings = settings
        self.network = network = lm.network()
        self.frames = Frames(lm, prompts, settings)
        self.initial = self.frames.initial()
        self.targets = self._completions(lm, targets)
        # a recurrent layer's state is not what the cache holds
        kept = lm.paths.walks and lm.paths.packed != 0 and not lm.paths.lean
        self.cached = kept and not lm.model.training
        self.batch = settings.batch
        alone = [TokenRow((token,), ()) for token in self.frames.allowed.tolist()]
        tokens = collate(alone, device=network.device)
        self.embeddings = network.capture(tokens, [EMBEDDING])[EMBEDDING].squeeze(1)
        self._caches: dict[int, DynamicCache] = {}  # by prompt

    def _completions(self, lm: LanguageModel, targets: Texts) -> list[tuple[Ids, ...]]:
        options = (lm.tokenizer, lm.context, self.settings.system_prompt)
        first = self.frames.text(self.initial)
        rows = []
        for i, target in enumerate(targets):
            message = self.frames.ahead[i] + first
            rows.append(Row(str(i), message, (target,)))
        found = [row.completions for row in tokenise(rows, *options)]
        if self.settings.whole_reply:
            return found
        (probe,) = tokenise([Row("", "a", ("a", "b"))], *options)
        end = shared_end(*probe.completions)
        return [(ids[: len(ids) - end],) for (ids,) in found]

    def losses(self, suffixes: Sequence[Ids], prompts: Sequence[int]) -> Tensor:
        """[suffixes, prompts] float64: mean loss over each target's tokens."""
        with torch.no_grad():
            columns = [self._in_parts(partial(self._losses, p), suffixes) for p in prompts]
        return torch.stack([torch.cat(column) for column in columns], 1)

    def ranked(self, suffix: Ids, prompts: Sequence[int]) -> Tensor:
        """[n_tokens, allowed] ids of tokens: the substitutes at each position, most promising
        first.
        """
        gradient = self.gradient(suffix, prompts).to(self.embeddings.dtype)
        promised = gradient @ self.embeddings.T
        return self.frames.allowed[promised.argsort(1).cpu()]

    def gradient(self, suffix: Ids, prompts: Sequence[int]) -> Tensor:
        """[n_tokens, d_model]: of the mean loss, in the suffix's embeddings as the first block
        reads them (behind the scaling by sqrt(d_model) of some models)."""
        parts = self._in_parts(partial(self._gradient, suffix), prompts)
        return reduce(torch.add, parts) / len(prompts)

    def _gradient(self, suffix: Ids, prompts: Sequence[int]) -> Tensor:
        """[n_tokens, d_model] gradient of the sum of the prompts' losses."""
        network = self.network
        batch = self._batch([(prompt, suffix) for prompt in prompts])
        shape = (*batch.shape, network.d_model)
        delta = torch.zeros(shape, dtype=network.dtype, device=network.device, requires_grad=True)
        with torch.enable_grad(), network.frozen_mode():
            states = network.label_rows(batch, {EMBEDDING: delta})
            loss = self._row_losses(batch, states).sum()
            (gradient,) = torch.autograd.grad(loss, delta)
        own = []
        for prompt, row in zip(prompts, gradient, strict=True):
            start = len(self.frames.around[prompt][0])
            own.append(row[start : start + len(suffix)].to(wide_of(network.dtype)))
        return reduce(torch.add, own)

    def _losses(self, prompt: int, suffixes: Sequence[Ids]) -> Tensor:
        """[n] losses of suffixes behind one prompt: of equal length, so nothing is padded."""
        cut = len(self.frames.around[prompt][0]) if self.cached else 0
        batch = self._batch([(prompt, suffix) for suffix in suffixes], cut)
        states = self._behind_cache(prompt, batch) if cut else self.network.label_rows(batch)
        return self._row_losses(batch, states)

    def _behind_cache(self, prompt: int, batch: Batch) -> Tensor:
        """[labels, d_model] states of rows whose tokens before the suffix are in the cache."""
        network: Any = self.network  # a stock one, see `cached`
        before, _ = self.frames.around[prompt]
        with network.frozen_mode():
            if prompt not in self._caches:
                cache = DynamicCache(config=network.model.config)
                ids = torch.tensor([before], device=network.device)
                network.decoder(ids, past_key_values=cache, use_cache=True)
                self._caches[prompt] = cache  # only now: the forward may run out of memory
            cache = copy.deepcopy(self._caches[prompt])  # a forward appends to it
            cache.batch_repeat_interleave(batch.shape[0])
            places = batch.positions + len(before)
            out = network.decoder(
                batch.ids, position_ids=places, past_key_values=cache, use_cache=True
            )
        return at_labels(out.last_hidden_state, batch.source)

    def _batch(self, asked: Sequence[tuple[int, Ids]], cut: int = 0) -> Batch:
        """Rows of (prompt, suffix), without their first `cut` tokens."""
        rows = [TokenRow(self.frames.ids(p, ids)[cut:], self.targets[p]) for p, ids in asked]
        return collate(rows, device=self.network.device)

    def _row_losses(self, batch: Batch, states: Tensor) -> Tensor:
        losses = token_losses(self.network.unembed, states, batch.labels)
        return row_means(losses.double(), batch.label_rows, batch.shape[0])

    def _in_parts(
        self, run: Callable[[Sequence[Any]], Tensor], items: Sequence[Any]
    ) -> list[Tensor]:
        """What `run` makes of as many of the items at a time as fit into memory; of half as many
        from then on whenever it runs out."""
        while True:
            try:
                starts = range(0, len(items), self.batch)
                return [run(items[at : at + self.batch]) for at in starts]
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                if self.batch == 1:
                    raise RuntimeError("not even one row fits into memory") from error
            self.batch //= 2
            clear_device_cache(garbage_collection=True)
