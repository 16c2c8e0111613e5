"""A profile of a small local model on two files, as what YAML holds; and what it names."""

from pathlib import Path
from typing import Any

from tiny_models import world_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM


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


def write_sources(folder: Path) -> None:
    """The model, harmful.csv and benign.csv."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    world_tokenizer().save_pretrained(folder / "model")
    for name, column, verb in (("harmful", "goal", "do"), ("benign", "instruction", "bake")):
        rows = [f"{verb} thing {number} now,Sure thing {number}" for number in range(20)]
        (folder / f"{name}.csv").write_text("\n".join([f"{column},target", *rows, ""]))
