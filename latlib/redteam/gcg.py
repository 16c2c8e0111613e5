"""Adversarial suffixes by GCG: a text behind a request that makes a model write a given reply; and
random search.

One suffix of n tokens is sought for all prompts at once (universal); a list of one prompt is the
individual attack. The loss is the mean over prompts of the mean cross-entropy, in nats, of the
target's tokens.
1. The prompt's ids are cut round the suffix: [before | suffix | behind | target]. The first suffix
   is a neutral text.
2. The loss's gradient at the suffix's embeddings, times the embedding of every token, is to first
   order what each substitution does; the `topk` best of each position are kept.
3. Candidates replace `n_replace` random positions by random tokens of these. What decoding, chat
   template and tokenizer do not give back unchanged is a text nobody could send: it is filtered,
   and another is drawn.
4. Each candidate is run with each prompt, `batch` rows at a time, half as many whenever memory runs
   out. Hugging Face models run the tokens before the suffix once (key-value cache); the lean
   forward of very small models each time.
5. The best candidate that survives behind every prompt enters a buffer of the best suffixes, and 2
   goes on from there.

`random_search` is the gradient-free control: without 2, any allowed token in 3, and one more
candidate a step, for as many queries. A query is one suffix with one prompt run forward; a gradient
pass counts as one for each of its prompts. Source: Zou et al. 2023 (arXiv 2307.15043), algorithms 1
and 2; here with all prompts from the start, and a buffer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from accelerate.utils import find_executable_batch_size
from torch import Tensor
from transformers import DynamicCache

from latlib.batch import Batch, TokenRow, collate
from latlib.hooks import EMBEDDING
from latlib.losses import at_labels, row_means, token_losses, wide_of
from latlib.models import LanguageModel
from latlib.network import StockNetwork
from latlib.text.chat import Row, chat_text, tokenise

Texts = Sequence[str]
Ids = tuple[int, ...]
OnStep = Callable[[int, int, str], None] | None
# draws until enough candidates survive; topk doubles after every fourth
DRAWS, DRAWS_AT_WIDTH = 12, 4


@dataclass(frozen=True)
class SuffixSettings:
    """How a suffix is sought. Raises ValueError naming the field, the value and the mend."""

    n_tokens: int = 20  # Zou et al.
    steps: int = 500  # Zou et al.
    candidates: int = 512  # Zou et al.: B
    topk: int = 256  # Zou et al.: k; no more than there are allowed tokens
    n_replace: int = 1  # Zou et al.
    # A step starts from the best kept suffix that no step has started from, else from the best: 1
    # takes improvements
    # only, as many as there are steps always moves on (Zou et al.); 3 did as well on an organism,
    # and can turn back.
    buffer: int = 3
    # prompts drawn for a step's gradient and candidates; 0 is all, as in Zou et al.
    prompts_per_step: int = 0
    batch: int = 64  # rows at a time, to begin with
    # '' is '! ! ! ...' (Zou et al.), or the first token whose repetition survives where that
    # doesn't
    initial: str = ""
    separator: str = " "  # between prompt and suffix
    # the target ends the reply; False for a beginning ('Sure, here is', Zou et al.)
    whole_reply: bool = True
    allow_non_ascii: bool = False  # Zou et al.
    prefix_cache: bool = True  # step 4; changes nothing but rounding
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = (
                getattr(self, field.name),
                int(field.name not in ("steps", "prompts_per_step")),
            )
            if field.type == "int" and (
                not isinstance(value, int) or isinstance(value, bool) or value < least
            ):
                raise ValueError(f"{field.name} = {value!r}: give a whole number >= {least}")
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
    on_step: OnStep = None,
) -> Suffix:
    """Seek one suffix under which the model writes each prompt's target; see the module's
    docstring.

    on_step: called after every step. Raises ValueError for input that cannot be used, RuntimeError
    when not even one row fits into memory. Weights, their gradients and flags stay as they are.
    """
    return _search(lm, prompts, targets, settings, seed, on_step, gradient=True)


def random_search(
    lm: LanguageModel,
    prompts: Texts,
    targets: Texts,
    settings: SuffixSettings,
    seed: int,
    on_step: OnStep = None,
) -> Suffix:
    """The gradient-free control of `gcg`, with as many queries; arguments and errors are the
    same.
    """
    return _search(lm, prompts, targets, settings, seed, on_step, gradient=False)


class Objective:
    """The loss of suffixes on a model, and its gradient. Prompts are named by their index."""

    def __init__(self, lm: LanguageModel, prompts: Texts, targets: Texts, settings: SuffixSettings):
        if (
            isinstance(prompts, str)
            or isinstance(targets, str)
            or not prompts
            or len(prompts) != len(targets)
        ):
            raise ValueError(
                f"{len(prompts)} prompts, {len(targets)} targets: give two lists of one length, 1"
                " or more"
            )
        self.network, self.tokenizer, self.settings, self.prompts = (
            lm.network(),
            lm.tokenizer,
            settings,
            list(prompts),
        )
        self.cached = (
            settings.prefix_cache
            and isinstance(self.network, StockNetwork)
            and not lm.model.training
        )
        self._caches, self._batches = {}, {}  # by prompt, by (prompt, number of rows)
        self.frames = [self._frame(prompt) for prompt in self.prompts]
        self.allowed = self._allowed(
            min(len(self.tokenizer), lm.model.get_input_embeddings().weight.shape[0])
        )
        # a completion each, once there is a first suffix
        self.targets: list[tuple[Ids, ...]] = [()] * len(prompts)
        self.initial = self._initial()
        rows = [
            Row(str(i), self._message(i, self.initial), (target,))
            for i, target in enumerate(targets)
        ]
        rows = tokenise(
            [*rows, Row("", "a", ("a", "b"))], self.tokenizer, lm.context, settings.system_prompt
        )
        *found, (a, b) = (row.completions for row in rows)
        # how many tokens end any reply
        end = next(i for i, (x, y) in enumerate(zip(a[::-1], b[::-1])) if x != y)
        self.targets = [
            (ids if settings.whole_reply else ids[: len(ids) - end],) for (ids,) in found
        ]
        singles = collate(
            [TokenRow((i,), ()) for i in self.allowed.tolist()], device=self.network.device
        )
        # [allowed, d_model]: what the first block reads for each token, whatever the model makes of
        # its embeddings
        self._table = self.network.capture(singles, [EMBEDDING])[EMBEDDING].squeeze(1)

    def text(self, ids: Sequence[int]) -> str:
        """A suffix's ids as text, without the separator that its first token may hold."""
        text = self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return text.removeprefix(self.settings.separator)

    def survives(self, candidates: Sequence[Ids], prompts: Sequence[int]) -> list[bool]:
        """Whether each suffix, as text behind each of the prompts, is tokenised with the whole chat
        to its own ids.
        """
        pairs = [(p, ids) for p in prompts for ids in candidates]
        found = self._tokens([self._message(p, ids) for p, ids in pairs])
        same = [
            tuple(a) == self._row(p, ids).prompt for a, (p, ids) in zip(found, pairs, strict=True)
        ]
        return [all(same[i :: len(candidates)]) for i in range(len(candidates))]

    @torch.no_grad()
    def losses(self, candidates: Sequence[Ids], prompts: Sequence[int], batch: int) -> Tensor:
        """[candidates, prompts] float64: mean loss over each target's tokens, `batch` rows at a
        time.
        """
        parts = torch.tensor(candidates, device=self.network.device).split(batch)
        return torch.stack(
            [torch.cat([self._losses(p, part) for part in parts]) for p in prompts], 1
        )

    def gradient(self, ids: Ids, prompts: Sequence[int], batch: int) -> Tensor:
        """[n_tokens, d_model]: of the mean loss, in the suffix's embeddings as the first block
        reads them (behind the scaling by sqrt(d_model) of some models)."""
        network, total = self.network, 0
        for part in (prompts[at : at + batch] for at in range(0, len(prompts), batch)):
            rows = collate([self._row(p, ids) for p in part], device=network.device)
            delta = torch.zeros(
                *rows.shape, network.d_model, dtype=network.dtype, device=network.device
            )
            with torch.enable_grad(), network.frozen_mode():
                losses = self._row_losses(
                    rows, network.label_rows(rows, {EMBEDDING: delta.requires_grad_()})
                )
                (gradient,) = torch.autograd.grad(losses.sum(), delta)
            own = (
                g[(at := len(self.frames[p][0])) : at + len(ids)] for g, p in zip(gradient, part)
            )
            total = total + sum(g.to(wide_of(network.dtype)) for g in own)
        return total / len(prompts)

    def ranked(self, ids: Ids, prompts: Sequence[int], batch: int) -> Tensor:
        """[n_tokens, allowed] indices into `allowed`: the substitutes at each position, most
        promising first.
        """
        return (
            (self.gradient(ids, prompts, batch).to(self._table.dtype) @ self._table.T)
            .argsort(1)
            .cpu()
        )

    def _losses(self, prompt: int, candidates: Tensor) -> Tensor:
        """[n] losses of candidates [n, n_tokens] behind one prompt: of equal length, so nothing is
        padded.
        """
        network, (n, width), before = self.network, candidates.shape, self.frames[prompt][0]
        cut = len(before) if self.cached else 0  # these tokens are in the cache
        # made once and written into: masks and rotary tables go with it
        if (prompt, n) not in self._batches:
            self._batches[prompt, n] = collate(
                [self._row(prompt, (0,) * width, cut)] * n, device=network.device
            )
        batch, start = self._batches[prompt, n], len(before) - cut
        batch.ids[:, start : start + width] = candidates
        if not cut:
            return self._row_losses(batch, network.label_rows(batch))
        with network.frozen_mode():
            if prompt not in self._caches:
                past, ids = (
                    DynamicCache(config=network.model.config),
                    torch.tensor([before], device=network.device),
                )
                network.decoder(ids, past_key_values=past, use_cache=True)
                self._caches[prompt] = past  # only now: the forward may run out of memory
            past = copy.deepcopy(self._caches[prompt])  # a forward appends to it
            past.batch_repeat_interleave(n)
            out = network.decoder(
                batch.ids, position_ids=batch.positions + cut, past_key_values=past, use_cache=True
            )
        return self._row_losses(batch, at_labels(out.last_hidden_state, batch.source))

    def _row_losses(self, batch: Batch, rows: Tensor) -> Tensor:
        losses = token_losses(self.network.unembed, rows, batch.labels)
        return row_means(losses.double(), batch.label_rows, batch.shape[0])

    def _row(self, prompt: int, ids: Ids, cut: int = 0) -> TokenRow:
        return TokenRow(
            (*self.frames[prompt][0], *ids, *self.frames[prompt][1])[cut:], self.targets[prompt]
        )

    def _message(self, prompt: int, ids: Sequence[int]) -> str:
        return self.prompts[prompt] + self.settings.separator + self.text(ids)

    def _tokens(self, messages: Sequence[str]) -> list[list[int]]:
        chats = [
            chat_text(self.tokenizer, message, self.settings.system_prompt) for message in messages
        ]
        return self.tokenizer(chats, add_special_tokens=False)["input_ids"] if chats else []

    def _frame(self, prompt: str) -> tuple[Ids, Ids]:
        """Ids before and behind the suffix, by where tokens lie; a separator that is a token of its
        own is before.
        """
        message = prompt + self.settings.separator
        probe = "a" if self.settings.separator else "!"  # merges with no neighbour
        chat = chat_text(self.tokenizer, message + probe, self.settings.system_prompt)
        begin = chat.rfind(message + probe) + len(message)
        if begin < len(message):
            raise ValueError(
                f"prompt {prompt!r}: the chat template changes it: remove white space at its ends"
            )
        found = self.tokenizer(chat, add_special_tokens=False, return_offsets_mapping=True)
        placed = list(zip(found["input_ids"], found["offset_mapping"]))
        before = tuple(i for i, (_, end) in placed if end <= begin)
        return before, tuple(i for i, (start, _) in placed if start > begin)

    def _allowed(self, vocabulary: int) -> Tensor:
        """[allowed] ids of printable tokens, none of the added ones, which mark turns."""
        texts = self.tokenizer.batch_decode(
            [[i] for i in range(vocabulary)], clean_up_tokenization_spaces=False
        )
        added = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        fine = [
            t != "" and t.isprintable() and (t.isascii() or self.settings.allow_non_ascii)
            for t in texts
        ]
        broken = ["\ufffd" in t for t in texts]  # a part of a character
        return torch.tensor(
            [i for i in range(vocabulary) if fine[i] and not broken[i] and i not in added]
        )

    def _initial(self) -> Ids:
        """The suffix that the search starts from."""
        n, text, everyone = self.settings.n_tokens, self.settings.initial, range(len(self.prompts))
        if text:
            (ids,), (before, behind) = (
                self._tokens([self.prompts[0] + self.settings.separator + text]),
                self.frames[0],
            )
            options = [tuple(ids[len(before) : len(ids) - len(behind)])]
        else:
            texts = {i: self.text([i]).strip() for i in self.allowed.tolist()}
            options = [
                (i,) * n for i in sorted(filter(texts.get, texts), key=lambda i: texts[i] != "!")
            ]
        for ids in options:
            if len(ids) == n and self.survives([ids], [0])[0] and self.survives([ids], everyone)[0]:
                return ids
        have = f"{len(options[0])} tokens, or not the same ones behind every prompt"
        raise ValueError(f"initial = {text!r} is {have}: give n_tokens = {n} that stay the same")


def _search(
    lm, prompts, targets, settings: SuffixSettings, seed: int, on_step: OnStep, gradient: bool
) -> Suffix:
    objective, fitting, queries, losses = (
        Objective(lm, prompts, targets, settings),
        settings.batch,
        0,
        [],
    )
    # suffix -> its loss, best first; suffixes that a step has started from
    kept, started = {}, set()

    def run(batch: int) -> None:
        """Go on behind the last whole step: one that runs out of memory is done again with a
        smaller batch.
        """
        nonlocal fitting, kept, queries
        fitting = batch
        if not kept:
            kept[objective.initial] = (
                objective.losses([objective.initial], range(len(prompts)), batch).mean().item()
            )
            queries += len(prompts)
        while len(losses) < settings.steps:
            origin = next((ids for ids in kept if ids not in started), next(iter(kept)))
            generator = torch.Generator().manual_seed(seed * 1_000_003 + len(losses))
            found, loss, spent = _step(objective, origin, batch, generator, gradient)
            kept = dict(
                sorted({**kept, found: loss}.items(), key=lambda item: item[1])[: settings.buffer]
            )
            started.add(origin)
            losses.append(min(kept.values()))
            queries += spent
            if on_step is not None:
                on_step(len(losses), settings.steps, f"loss {losses[-1]:.3f}")

    # the last is 0: give up
    halves = iter([settings.batch >> i for i in range(1, settings.batch.bit_length() + 1)])
    find_executable_batch_size(
        run, starting_batch_size=settings.batch, reduce_batch_size_fn=halves.__next__
    )()
    ids, loss = next(iter(kept.items()))
    return Suffix(
        objective.text(ids), ids, loss, tuple(losses), queries, fitting, settings.separator
    )


def _step(
    objective: Objective, origin: Ids, batch: int, generator: torch.Generator, gradient: bool
):
    """(the best candidate of a step from `origin`, its loss over all prompts, queries)."""
    settings, n = objective.settings, len(objective.prompts)
    order, some = torch.randperm(n, generator=generator).tolist(), settings.prompts_per_step or n
    drawn, others = sorted(order[:some]), sorted(order[some:])
    anything = torch.arange(len(objective.allowed)).expand(len(origin), -1)
    ranked = objective.ranked(origin, drawn, batch) if gradient else anything
    width, count = (
        (settings.topk, settings.candidates)
        if gradient
        else (ranked.shape[1], settings.candidates + 1)
    )
    candidates = _candidates(objective, origin, ranked, width, count, generator)
    losses = objective.losses(candidates, drawn, batch)
    by_loss = losses.mean(1).argsort(stable=True).tolist()
    best = next((i for i in by_loss if objective.survives([candidates[i]], range(n))[0]), None)
    winner = candidates[by_loss[0] if best is None else best]
    rest = objective.losses([winner], others, batch)[0] if others else losses.new_zeros(0)
    # what does not survive has an infinite loss: it may be started from, and is never the best
    loss = float("inf") if best is None else torch.cat((losses[best], rest)).mean().item()
    return winner, loss, len(drawn) * (count + gradient) + len(others)


def _candidates(
    objective: Objective, origin: Ids, ranked: Tensor, width: int, count: int, generator
) -> list[Ids]:
    """`count` suffixes near `origin` that survive behind the first prompt, from `width` columns of
    `ranked` ([n_tokens, allowed]) or more where too few survive; then repeated, for the number of
    queries is a promise."""
    found: dict[Ids, None] = {}
    for draw in range(DRAWS):
        columns = min(width << draw // DRAWS_AT_WIDTH, ranked.shape[1])
        places = torch.rand(2 * count, len(origin), generator=generator).argsort(1)[
            :, : objective.settings.n_replace
        ]
        choice = ranked[places, torch.randint(columns, places.shape, generator=generator)]
        drawn = (
            torch.tensor(origin).repeat(2 * count, 1).scatter(1, places, objective.allowed[choice])
        )
        fresh = [
            ids
            for ids in dict.fromkeys(map(tuple, drawn.tolist()))
            if ids not in found and ids != origin
        ]
        found.update((ids, None) for ids, yes in zip(fresh, objective.survives(fresh, [0])) if yes)
        if len(found) >= count:
            break
    pool = list(found)[:count] or [origin]
    return [pool[i % len(pool)] for i in range(count)]
