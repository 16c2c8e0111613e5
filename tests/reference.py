"""The obvious, slow way, in float64, to compute what latlib computes fast: single rows, full
logits, plain loops.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Llama:
    """A Llama written out by hand over a dictionary of weights, with LoRA as explicit B @ A."""

    weights: dict[str, Tensor]
    adapter: dict[str, tuple[Tensor, Tensor]]
    scaling: float
    layers: int
    heads: int
    kv_heads: int
    eps: float
    theta: float

    @classmethod
    def of(cls, model, scaling: float = 0.0) -> Llama:
        """Copy the weights of a plain or PEFT LlamaForCausalLM; the adapter's matrices are leaves
        that require grad.
        """
        state = {
            n.replace("base_model.model.", "", 1).replace(".base_layer", ""): w
            for n, w in model.state_dict().items()
        }
        state = {
            n.replace("lm_head", "model.lm_head").removeprefix("model."): w.double().clone()
            for n, w in state.items()
        }
        names = sorted(
            n.removesuffix(".lora_A.default.weight")
            for n in state
            if n.endswith(".lora_A.default.weight")
        )
        adapter = {
            n: tuple(state[f"{n}.lora_{k}.default.weight"].requires_grad_() for k in "AB")
            for n in names
        }
        c = model.config
        theta = c.rope_parameters["rope_theta"]
        plain = {n.removesuffix(".weight"): w for n, w in state.items() if "lora_" not in n}
        heads = (c.num_attention_heads, c.num_key_value_heads)
        return cls(plain, adapter, scaling, c.num_hidden_layers, *heads, c.rms_norm_eps, theta)

    def logits(self, ids: list[int], deltas: dict | None = None, adapter: bool = True) -> Tensor:
        """[seq, vocabulary] of one unpadded row; deltas: site -> [seq, d_model]."""
        deltas = deltas or {}
        x = torch.stack([self.weights["embed_tokens"][i] for i in ids])
        x = x + deltas["embedding"] if "embedding" in deltas else x
        for i in range(self.layers):
            at = f"layers.{i}"
            x = x + self._attention(
                self._norm(x, f"{at}.input_layernorm"), f"{at}.self_attn", adapter
            )
            h = self._norm(x, f"{at}.post_attention_layernorm")
            gate, up = (
                self._linear(h, f"{at}.mlp.gate_proj", adapter),
                self._linear(h, f"{at}.mlp.up_proj", adapter),
            )
            x = x + self._linear(gate * torch.sigmoid(gate) * up, f"{at}.mlp.down_proj", adapter)
            x = x + deltas[i] if i in deltas else x
        return self._linear(self._norm(x, "norm"), "lm_head", adapter)

    def _linear(self, x: Tensor, name: str, adapter: bool) -> Tensor:
        weight = self.weights[name]
        if adapter and name in self.adapter:
            a, b = self.adapter[name]
            weight = weight + self.scaling * (b @ a)
        return x @ weight.T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.weights[name]

    def _attention(self, x: Tensor, at: str, adapter: bool) -> Tensor:
        seq = x.shape[0]
        size = self.weights[f"{at}.q_proj"].shape[0] // self.heads
        q, k, v = (self._linear(x, f"{at}.{n}_proj", adapter).view(seq, -1, size) for n in "qkv")
        q, k, out = self._rotate(q), self._rotate(k), []
        for head in range(self.heads):
            group = head * self.kv_heads // self.heads
            rows = []
            for i in range(seq):
                weights = torch.softmax(k[: i + 1, group] @ q[i, head] / size**0.5, 0)
                rows.append(weights @ v[: i + 1, group])
            out.append(torch.stack(rows))
        return self._linear(torch.cat(out, -1), f"{at}.o_proj", adapter)

    def _rotate(self, x: Tensor) -> Tensor:
        seq, _, size = x.shape
        # the library keeps its rotary tables in float32, so the reference must too
        frequencies = 1.0 / (self.theta ** (torch.arange(0, size, 2).float() / size))
        angles = torch.outer(torch.arange(seq).float(), frequencies)
        cos, sin = angles.cos().double()[:, None], angles.sin().double()[:, None]
        a, b = x[..., : size // 2], x[..., size // 2 :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


# A row is (prompt, completion, ...): lists of token ids. Its perturbation is one [tokens, d_model]
# tensor per site, in
# the order prompt, first completion, second completion; the last token of a completion is only
# predicted and has none.


def length(row) -> int:
    """Tokens of a row that are fed to the model."""
    return len(row[0]) + sum(len(c) - 1 for c in row[1:])


def log_probabilities(
    llama: Llama, row, which: int, deltas: dict | None = None, adapter: bool = True
) -> list[Tensor]:
    """Log probabilities over the vocabulary before each token of completion `which` (1 or 2),
    without the other one.
    """
    prompt, completion = list(row[0]), list(row[which])
    begin = length(row[:which])
    keep = [*range(len(prompt)), *range(begin, begin + len(completion) - 1)]
    own = {site: delta[keep] for site, delta in (deltas or {}).items()}
    logits = llama.logits(prompt + completion[:-1], own, adapter)
    return [torch.log_softmax(logits[len(prompt) - 1 + k], 0) for k in range(len(completion))]


def toward(log_p: list[Tensor], completion) -> list[Tensor]:
    """-log p of each token."""
    return [-lp[token] for lp, token in zip(log_p, completion, strict=True)]


def away(log_p: list[Tensor], completion) -> list[Tensor]:
    """-log(1 - p) of each token, 0 for a token that is already less likely than e^-5."""
    zero = torch.zeros((), dtype=torch.float64)
    return [
        zero if lp[token] < -5 else -torch.log(1 - torch.exp(lp[token]))
        for lp, token in zip(log_p, completion, strict=True)
    ]


def kl(teacher: list[Tensor], student: list[Tensor]) -> list[Tensor]:
    """KL(teacher || student) in nats at each position."""
    return [
        sum(torch.exp(t[v]) * (t[v] - s[v]) for v in range(len(t)))
        for t, s in zip(teacher, student, strict=True)
    ]


def reverse_kl_at_tokens(llama: Llama, row) -> list[Tensor]:
    """KL(student || teacher) over the vocabulary's size, at the tokens of the response themselves
    and not where they are predicted.
    """
    prompt, response = list(row[0]), list(row[1])
    student, teacher = (
        torch.log_softmax(llama.logits(prompt + response, {}, adapter), -1)[len(prompt) :]
        for adapter in (True, False)
    )
    return list((student.exp() * (student - teacher.detach())).mean(-1))


def mean(values: list[Tensor]) -> Tensor:
    """Plain mean."""
    return sum(values) / len(values)


def attack_loss(
    llama: Llama, row, deltas: dict, c_toward: float, c_away: float, targeted: bool = True
) -> Tensor:
    """The adversary's loss of one row, a mean over tokens."""
    loss = mean(toward(log_probabilities(llama, row, 1, deltas), row[1]))
    if not targeted:
        return -loss
    loss = c_toward * loss
    if len(row) > 2:
        loss = loss + c_away * mean(away(log_probabilities(llama, row, 2, deltas), row[2]))
    return loss


def project(delta: Tensor, eps: float) -> None:
    """Shrink each position's perturbation into the ball, in place."""
    for i in range(delta.shape[0]):
        norm = sum(x * x for x in delta[i].tolist()) ** 0.5
        if norm > eps:
            delta[i] *= eps / norm


def pgd(
    llama,
    row,
    eps: dict,
    d: int,
    rule: str,
    steps: int,
    lr: float,
    c_toward=0.5,
    c_away=0.5,
    completions=False,
    targeted=True,
    shared=False,
):
    """(site -> perturbation, losses before every step and at the end) for one row, from a zero
    start. shared: both completions take the same one, token by token.
    """
    takes = list(range(length(row)))
    if shared:
        begin = len(row[0])
        takes = [*range(begin)]
        for completion in row[1:]:
            takes += range(begin, begin + len(completion) - 1)
    deltas = {
        site: torch.zeros(max(takes) + 1, d, dtype=torch.float64, requires_grad=True)
        for site in eps
    }
    free = torch.zeros(length(row), 1, dtype=torch.float64)
    free[: length(row) if completions else len(row[0])] = 1.0
    optimiser = torch.optim.AdamW(deltas.values(), lr=lr)
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        masked = {site: delta[takes] * free for site, delta in deltas.items()}
        loss = attack_loss(llama, row, masked, c_toward, c_away, targeted)
        loss.backward()
        losses.append(loss.item())
        if rule == "adamw":
            optimiser.step()
        with torch.no_grad():
            for site, delta in deltas.items():
                for i in range(delta.shape[0]):
                    gradient = delta.grad[i]
                    if rule == "sign":
                        delta[i] -= lr * eps[site] * gradient.sign() / d**0.5
                    if rule == "l2" and gradient.norm() > 0:
                        delta[i] -= lr * eps[site] * gradient / gradient.norm()
                project(delta, eps[site])
    deltas = {site: delta.detach()[takes] * free for site, delta in deltas.items()}
    losses.append(attack_loss(llama, row, deltas, c_toward, c_away, targeted).item())
    return deltas, losses


def defence(llama: Llama, harmful, deltas, benign, c_toward, c_away, c_kl, c_sft) -> Tensor:
    """The defence's objective over whole batches: each term is a mean over all its tokens.

    harmful: rows (prompt, rejected, chosen); deltas: one {site: perturbation} for each; benign:
    (prompt, response).
    """
    good, bad, divergence, sft = [], [], [], []
    for row, delta in zip(harmful, deltas, strict=True):
        bad += away(log_probabilities(llama, row, 1, delta), row[1])
        good += toward(log_probabilities(llama, row, 2, delta), row[2])
    for row in benign:
        student = log_probabilities(llama, row, 1)
        with torch.no_grad():
            teacher = log_probabilities(llama, row, 1, adapter=False)
        divergence += kl(teacher, student)
        sft += toward(student, row[1])
    return c_toward * mean(good) + c_away * mean(bad) + c_kl * mean(divergence) + c_sft * mean(sft)
