"""What every test starts from: no network, no account, none of the user's run folders, nothing that
busy-waits.
"""

import os
import tempfile
from pathlib import Path

import hypothesis
import pytest

# The same examples every time, and no deadline: a busy machine is no failure.
hypothesis.settings.register_profile("latlib", derandomize=True, deadline=None)
hypothesis.settings.load_profile("latlib")

_HOME = Path(tempfile.mkdtemp(prefix="latlib-tests-"))

# Set before torch, transformers or wandb can be imported, and inherited by the kernels and scripts
# that tests start.
os.environ.update(
    OMP_WAIT_POLICY="PASSIVE",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    WANDB_ERROR_REPORTING="false",
    WANDB_CACHE_DIR=str(_HOME / "wandb-cache"),
    WANDB_CONFIG_DIR=str(_HOME / "wandb-config"),
    WANDB_DATA_DIR=str(_HOME / "wandb-data"),
    NETRC=str(_HOME / "no-netrc"),
    MPLBACKEND="Agg",
    LATLIB_BATCH="1",
    JUPYTER_PLATFORM_DIRS="1",
)
os.environ.setdefault("LATLIB_PROFILE", "smoke")
os.environ.setdefault("LATLIB_RUNS", str(_HOME / "runs"))
os.environ.pop("WANDB_API_KEY", None)
os.environ.pop("WANDB_BASE_URL", None)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


def pytest_sessionfinish() -> None:
    import shutil

    shutil.rmtree(_HOME, ignore_errors=True)
