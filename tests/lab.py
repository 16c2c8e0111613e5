"""JupyterLab as a reader has it, in a headless Chromium, without any setting or file of the user's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OWN = ROOT / "latlib" / "experiment" / "templates" / "jupyterlab.json"  # of an installed latlib
PATIENCE_S = 120  # for a server, a kernel or a cell on a machine that has other work
SETTINGS = {
    # nobody is asked about news, and every cell is on the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}
PANEL = "window.jupyterapp.shell.currentWidget"
# Open a notebook, and listen to what its kernel says beside the outputs of cells: an error in a
# widget's callback.
OPEN = """
async path => {
  const panel = await window.jupyterapp.commands.execute("docmanager:open", { path });
  await panel.context.ready;
  await panel.sessionContext.ready;
  window.troubles = [];
  panel.sessionContext.iopubMessage.connect((_, message) => {
    const { content, header } = message;
    const said = content.evalue ?? content.text ?? "";
    // asked for the widgets of a kernel that has none yet
    if (said.startsWith("No such comm")) return;
    if (header.msg_type === "error" || content.name === "stderr") window.troubles.push(said);
  });
}
"""


class Lab:
    """JupyterLab in a page, with one notebook open at a time."""

    def __init__(self, page, address: str) -> None:
        page.set_default_timeout(1000 * PATIENCE_S)
        page.goto(f"{address}/lab?reset")  # nothing that was open before
        page.wait_for_function("window.jupyterapp")
        page.evaluate("window.jupyterapp.restored")
        self.page = page

    def open(self, name: str) -> None:
        """Open a notebook with a new kernel."""
        self.page.evaluate(OPEN, name)

    def close(self) -> None:
        """Save the notebook, close it, and end its kernel."""
        self.command("docmanager:save")
        self.page.evaluate(f"{PANEL}.sessionContext.shutdown()")
        self.page.evaluate(f"{PANEL}.dispose()")

    def command(self, name: str) -> object:
        """What a command of JupyterLab answers."""
        return self.page.evaluate("name => window.jupyterapp.commands.execute(name)", name)

    def start(self, name: str) -> None:
        """Begin what a command does."""
        self.page.evaluate("name => void window.jupyterapp.commands.execute(name)", name)

    def restart_and_run_all(self) -> None:
        """As a reader does, who is asked whether to restart, until all cells have run."""
        what = "window.jupyterapp.commands.execute('notebook:restart-run-all')"
        self.page.evaluate(f"void (window.restarted = {what})")
        self.page.locator(".jp-Dialog .jp-mod-accept").click()
        assert self.page.evaluate("window.restarted") is True

    def notebook(self) -> dict:
        """The notebook as it would be saved."""
        return self.page.evaluate(f"{PANEL}.content.model.toJSON()")

    def outputs(self, kind: str) -> list[dict]:
        """Those outputs of cells that are of a type."""
        found = []
        for cell in self.notebook()["cells"]:
            found += [o for o in cell.get("outputs", []) if o["output_type"] == kind]
        return found

    def troubles(self) -> list[str]:
        """Errors and lines on stderr: of cells, and of what widgets call."""
        found = self.page.evaluate("window.troubles")
        found += [error["evalue"] for error in self.outputs("error")]
        return found + [o["text"] for o in self.outputs("stream") if o["name"] == "stderr"]

    def idle(self) -> None:
        """Wait until the kernel has done all that it was asked for."""
        self.page.evaluate(
            f"{PANEL}.sessionContext.session.kernel.requestExecute({{code: ''}}).done"
        )


@contextmanager
def served(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """The address of a JupyterLab server on the notebooks in `folder`; its files lie beside them."""
    place = folder / ".jupyter"
    for name, values in SETTINGS.items():
        file = place / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(values))
    installed = place / "installed" / "overrides.d"
    installed.mkdir(parents=True)
    shutil.copy(OWN, installed / "latlib.json")
    own = {
        f"JUPYTER_{kind}_DIR": str(place / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")
    }
    options = [
        "--no-browser",
        "--port=0",
        f"--ServerApp.root_dir={folder}",
        "--IdentityProvider.token=",
        "--ServerApp.allow_root=True",
        "--LabApp.expose_app_in_browser=True",
        f"--LabApp.app_settings_dir={installed.parent}",
        f"--LabApp.user_settings_dir={place / 'settings'}",
        f"--LabApp.workspaces_dir={place / 'workspaces'}",
    ]
    with (place / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            env=os.environ | own | environment,
            stdout=log,
            stderr=log,
        )
        try:
            yield _address(place, server)
        finally:
            server.terminate()
            server.wait(30)


def _address(place: Path, server: subprocess.Popen) -> str:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until and server.poll() is None:
        for file in (place / "runtime").glob("jpserver-*.json"):
            if text := file.read_text():
                return json.loads(text)["url"].rstrip("/")
        time.sleep(0.2)
    raise RuntimeError(f"no JupyterLab: {(place / 'server.log').read_text()[-2000:]}")
