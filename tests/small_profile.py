"""A profile of a small local model on two files, as what YAML holds."""

from typing import Any


def small_run() -> dict[str, Any]:
    """Its model, harmful.csv and benign.csv are to be in the working folder."""
    return {
        "name": "small",
        "description": "a test",
        "seeds": [0],
        "model": {"source": "model"},
        "data": {"source": "files", "harmful": "harmful.csv", "benign": "benign.csv"},
        "train": {
            "steps": 4,
            "batch": 2,
            "benign_batch": 2,
            "micro_batch": 2,
            "attack": {"sites": [1], "steps": 2},
        },
        "methods": {"lat": {}},
    }
