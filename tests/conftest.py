"""What every test starts from: no network, no account, none of the user's run folders, nothing that
busy-waits.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    from latlib import Run

# The same examples every time, and no deadline: a busy machine is no failure.
hypothesis.settings.register_profile("latlib", derandomize=True, deadline=None)
hypothesis.settings.load_profile("latlib")

_HOME = Path(tempfile.mkdtemp(prefix="latlib-tests-"))

# Set before numpy, torch, transformers or wandb can be imported, and inherited by the kernels and
# scripts that tests start.
os.environ.update(
    OMP_NUM_THREADS="1",  # numpy's threads wait busily for those of the worker beside
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
# Side by side (pytest-xdist), each worker has run folders of its own.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["LATLIB_RUNS"] = str(Path(os.environ["LATLIB_RUNS"]) / worker)
os.environ.pop("WANDB_API_KEY", None)
os.environ.pop("WANDB_BASE_URL", None)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def smoke_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of the profile `smoke` with its base model and residual norms of seed 0, and
    nothing else. To be copied, never written to."""
    from latlib.experiment.run import Run

    run = Run("smoke", tmp_path_factory.mktemp("smoke") / "base")
    run.norms(0)  # makes the base model
    return run.folder


@pytest.fixture(scope="session")
def smoke_models(smoke_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`smoke_base` with the adapters of ssft and lat, seed 0. To be copied, never written to."""
    from latlib.experiment.run import Run

    folder = tmp_path_factory.mktemp("smoke") / "models"
    shutil.copytree(smoke_base, folder)
    Run("smoke", folder).ensure([("ssft", 0), ("lat", 0)])
    return folder


@pytest.fixture(scope="module")
def smoke_run(smoke_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A module's own smoke run, in which base, ssft and lat of seed 0 are already there."""
    from latlib.experiment.run import Run

    folder = tmp_path_factory.mktemp("smoke") / "run"
    shutil.copytree(smoke_models, folder)
    return Run("smoke", folder)


@pytest.fixture(autouse=True)
def _no_figure_is_left() -> Iterator[None]:
    """Of a figure that one test began no other is told."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture
def chromium() -> Iterator[Any]:
    """A browser: Debian's, or playwright's own; where there is neither, the test is skipped. For
    one test only: playwright's event loop stands in the way of others."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with api.sync_playwright() as playwright:
        debian = shutil.which("chromium")
        try:
            browser = playwright.chromium.launch(
                executable_path=debian, args=["--no-sandbox"] if os.getuid() == 0 else []
            )
        except api.Error as error:
            how = "apt-get install chromium, or playwright install chromium"
            pytest.skip(f"no Chromium here ({how}): {str(error)[:200]}")
        yield browser
        browser.close()


def pytest_sessionfinish() -> None:
    shutil.rmtree(_HOME, ignore_errors=True)
