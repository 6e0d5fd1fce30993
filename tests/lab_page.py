"""JupyterLab in one page of a browser, as the tests use it, and notebooks to open in it."""

import json
import re
import time
import urllib.request

import nbformat
from conftest import HERE

SCREENS = HERE.parent / "build" / "screens"
# JupyterLab's own, of extensions and files that a fresh installation does not have.
HARMLESS = re.compile(r"Failed to load resource: the server responded with a status of 404")
RED = "[data-mime-type*=stderr]"  # errors, and what is written to the standard error


def write_notebook(path, *sources):
    """A notebook of code cells."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


class Lab:
    """JupyterLab on a folder, in one page."""

    def __init__(self, page, address, folder):
        self.page, self.address, self.folder, self.errors = page, address, folder, []
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._said)

    def _said(self, message):
        if message.type == "error" and not HARMLESS.search(message.text):
            self.errors.append(message.text)

    def open(self, name):
        self.name = name
        self.page.goto(f"{self.address}/{name}.ipynb?reset")
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell")

    def run_all(self):
        self.page.wait_for_selector("text=/Python 3.* . Idle/")  # else the lab asks which kernel
        self.page.click("text=Run >> nth=0")
        self.page.click("text=Run All Cells >> nth=0")

    def ran(self, seconds=600):
        """Waits until all cells have run, or one has failed."""
        # Folded cells show no number.
        numbered = "[...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].every("
        numbered += r"each => /\[\d+\]/.test(each.textContent))"
        failed = f"document.querySelector('{RED} .ansi-red-fg')"
        self.page.wait_for_function(f"{numbered} || {failed}", timeout=1000 * seconds)
        self.finish()

    def finish(self, seconds=60):
        """Waits until this page's kernel has been idle for a second.

        Others do not count: one whose page was closed before it answered stays at "starting".
        """
        server, idle = self.address.removesuffix("/lab/tree"), 0
        for _ in range(4 * seconds):
            time.sleep(0.25)
            with urllib.request.urlopen(f"{server}/api/sessions") as answer:
                kernels = {each["path"]: each["kernel"] for each in json.load(answer)}
            state = kernels.get(f"{self.name}.ipynb", {}).get("execution_state")
            idle = idle + 1 if state == "idle" else 0
            if idle == 4:
                return
        raise TimeoutError("the kernel is still busy")

    def saved(self, name):
        self.page.keyboard.press("Control+s")
        self.page.wait_for_selector(".jp-mod-dirty", state="detached")
        return nbformat.read(self.folder / f"{name}.ipynb", as_version=4)

    def shut_down(self):
        """Ends the kernel, so that the next test has the memory to itself."""
        self.page.click("text=Kernel >> nth=0")
        self.page.click("text=Shut Down Kernel >> nth=0")
        self.page.wait_for_selector("text=/No Kernel|Unknown/")

    def screen(self, name):
        SCREENS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENS / f"{name}.png")
