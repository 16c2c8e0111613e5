"""latlib: latent adversarial training (LAT), its attacks and its audit.

The modules beside this file are the method, and can be read in an evening: `threat` says what an
adversary may do, `hooks` where it does it, `attack` how it searches, `losses` and `objectives` what
a defence minimises, `train` how. The packages around them prepare, measure and report.

    from latlib import Run, LATHook, Capture, Ablate, pgd, ThreatModel, PGD, Trainer
    from latlib import load_model, generate, encode, gcg, Evidence

These names are loaded when they are first used, so that `import latlib` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_PUBLIC = {
    "attack": ["pgd"],
    "evaluation.generate": ["generate"],
    "experiment.run": ["Run"],
    "hooks": ["Ablate", "Capture", "LATHook"],
    "models": ["load_model"],
    "redteam.gcg": ["gcg"],
    "report.evidence": ["Evidence"],
    "text.encodings": ["encode"],
    "threat": ["PGD", "ThreatModel"],
    "train": ["Trainer"],
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names}


def __getattr__(name: str) -> Any:
    """A public name, from the module that it stands in (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'latlib' has no attribute {name!r}")
    return getattr(import_module(f"latlib.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
