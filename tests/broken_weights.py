"""What breaks the weights of a model folder in shards."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from latlib.io.weights import INDEX


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def without_a_shard(folder: Path) -> None:
    shard(folder).unlink()


def cut(folder: Path) -> None:
    path = shard(folder)
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_the_header(folder: Path) -> None:
    path = shard(folder)
    path.write_bytes(path.read_bytes()[:20])


def emptied(folder: Path) -> None:
    shard(folder).write_bytes(b"")


def pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 100\n"
    shard(folder).write_text(text)


def with_value(path: Path, value: float) -> None:
    """One number of the last tensor in a file is another."""
    values = load_file(path)
    values[sorted(values)[-1]].view(-1)[3] = value
    save_file(values, path, metadata={"format": "pt"})


def without_a_layer(folder: Path) -> None:
    """Shards and index agree, and both lack block 3."""
    index = json.loads((folder / INDEX).read_text())
    for path in folder.glob("model-*.safetensors"):
        kept = {n: v for n, v in load_file(path).items() if ".layers.3." not in n}
        save_file(kept, path, metadata={"format": "pt"})
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if ".layers.3." not in n}
    (folder / INDEX).write_text(json.dumps(index))
