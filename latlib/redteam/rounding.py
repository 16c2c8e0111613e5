"""What of a perturbation arrives in a residual stream of 16 bits.

A stream in bfloat16 has steps of 1/256 of each coordinate: what is added below half of a step is
rounded away, so an attack within a small radius acts on the few coordinates that are near zero. How
much arrives is measured: what the rounded sum moves, along the perturbation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latlib.batch import Batch
from latlib.network_protocol import Network
from latlib.threat import ThreatModel

ARRIVES = 0.9  # least share of a perturbation that should arrive: our choice


def share_added(stream: Tensor, radius: float) -> float:
    """How much of random perturbations of norm `radius` arrives in a stream: [n, d_model]."""
    random = torch.Generator().manual_seed(0)
    delta = torch.randn(stream.shape, generator=random, dtype=torch.float64)
    delta *= radius / delta.norm(dim=-1, keepdim=True)
    delta = delta.to(stream.device, stream.dtype)
    total = stream + delta
    moved = total.double() - stream.double()
    wanted = delta.double()
    along = (moved * wanted).sum()
    return float(along / wanted.square().sum())


def lost_in_rounding(network: Network, batch: Batch, threat: ThreatModel) -> str:
    """That too little of a perturbation arrives at some site, in words; '' where enough does. The
    stream is that of the batch's prompts, the first token left out.
    """
    if network.dtype.itemsize > 2:
        return ""
    index = ((batch.segments == 0) & (batch.positions > 0)).flatten().nonzero().squeeze(1)
    streams = network.capture(batch, threat.sites, index)
    shares = {site: share_added(streams[site], r) for site, r in threat.radius.items()}
    site = min(shares, key=shares.__getitem__)
    if shares[site] >= ARRIVES:
        return ""
    norm = streams[site].float().norm(dim=-1).median().item()
    return (
        f"a radius of {threat.radius[site]:.2g} is {threat.radius[site] / norm:.2g} of the stream's"
        f" norm at site {site}, and {name_of(network.dtype)} adds {shares[site]:.0%} of so small a"
        " perturbation: raise eps, or set model.dtype: float32"
    )


def name_of(dtype: torch.dtype) -> str:
    """Without the library's name."""
    return str(dtype).removeprefix("torch.")
