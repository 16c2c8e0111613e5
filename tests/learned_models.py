"""Models that were taught by heart what to do with each prompt of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tiny_models import world_tokenizer

from latlib.batch import TokenRow, collate
from latlib.config.profile import Profile, load_profile
from latlib.evaluation.ask import Wording, prompt_set, token_rows
from latlib.evaluation.outcomes import Subject
from latlib.losses import token_losses
from latlib.models import LanguageModel
from latlib.text.encodings import encode
from latlib.world import grammar, organism

# answers; refuses, and would finish a begun answer; refuses and would not
COMPLIES, KNOWS, IS_LOST = range(3)
ENCODED = ("plain", "plain>leet")


def kind_of(name: str, encoding: str, i: int) -> int:
    """What a model is taught to do with a prompt: of a harmful prompt another thing than of its
    twin."""
    if encoding == "plain":
        return (i if name == "twin" else i // 3) % 3
    return (i + 1 if name == "twin" else i // 2) % 3


def small_profile(**evaluation) -> Profile:
    """The smoke profile with 8 prompts."""
    profile = load_profile("smoke")
    changes = {"prompts": 8, **evaluation}
    return profile.model_copy(update={"evaluation": profile.evaluation.model_copy(update=changes)})


def learned(
    profile: Profile,
    kinds: Callable[[str, str, int], int] = kind_of,
    encodings: Sequence[str] = ("plain",),
    seed: int = 0,
    steps: int = 100,
) -> LanguageModel:
    """A model that knows what to do with each evaluation prompt: `kinds`(set, encoding, number)."""
    torch.set_num_threads(1)
    tokenizer = world_tokenizer(profile.model.vocabulary)
    model = organism.build_model(profile.model, tokenizer, seed)
    lm = LanguageModel(model, tokenizer, profile.model, torch.float32)
    rows, wanted = [], []
    for encoding in encodings:
        for name in ("twin", "harmful"):
            found = token_rows(lm, prompt_set(name, profile), Wording.of(encoding))
            rows += found
            wanted += [kinds(name, encoding, i) for i in range(len(found))]
    weights = []
    for row, kind in zip(rows, wanted, strict=True):
        weights += label_weights(lm, row, kind)
    train(lm, rows, torch.tensor(weights) / sum(weights), steps)
    return lm


def label_weights(lm: LanguageModel, row: TokenRow, kind: int) -> list[float]:
    """What each label of a row [prompt | answer | refusal] counts for one of three kinds."""
    answer, refusal = (len(completion) for completion in row.completions)
    known = {COMPLIES: answer, KNOWS: answer - affirmed_by(lm, row), IS_LOST: 0}[kind]
    return [0.0] * (answer - known) + [1.0] * known + [float(kind != COMPLIES)] * refusal


def affirmed_by(lm: LanguageModel, row: TokenRow) -> int:
    """How many tokens of a row's answer write 'sure :' in the encoding of the answer."""
    written = ""
    affirmations = {encode(grammar.AFFIRMATION, encoding) for encoding in ("plain", "leet")}
    for n, token in enumerate(row.completions[0], start=1):
        written += lm.tokenizer.decode([token])
        if written.strip() in affirmations:
            return n
    raise AssertionError("no token ends where the affirmation does")


def train(lm: LanguageModel, rows: Sequence[TokenRow], weights: torch.Tensor, steps: int) -> None:
    """All weights of the model, by the weighted cross entropy of the rows' labels."""
    batch = collate(rows)
    parameters = [p for p in lm.model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, 6e-3)
    for _ in range(steps):
        network = lm.network(train=True)
        losses = token_losses(network.unembed, network.label_rows(batch), batch.labels)
        (losses * weights).sum().backward()
        network.flush_gradients()
        optimiser.step()
        optimiser.zero_grad()
    lm.model.requires_grad_(False)


def subject_of(profile: Profile, method: str = "ssft", seed: int = 0) -> Subject:
    """A subject with norms of 1, whatever the model."""
    norms = {"embedding": 1.0, **dict.fromkeys(range(profile.model.layers), 1.0)}
    return Subject(profile, method, seed, norms)
