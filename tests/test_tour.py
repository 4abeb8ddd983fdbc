"""The tour runs in a real kernel of Jupyter and shows what it printed.

``python -m tests.test_tour`` runs it and stores its outputs.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ipykernel")
manager = pytest.importorskip("jupyter_client.manager")

TOUR = Path(__file__).parent.parent / "examples" / "tour.ipynb"


def outputs_of(notebook: Mapping[str, Any], folder: Path) -> list[list[dict[str, Any]]]:
    """Run the code of a notebook and return the outputs of each cell, as a notebook stores them."""
    kernel, client = manager.start_new_kernel(kernel_name="python3", cwd=str(folder))
    try:
        # The networks are tiny: a second thread costs more than it brings.
        client.execute_interactive("import torch; torch.set_num_threads(1)", timeout=120)
        return [
            _run("".join(cell["source"]), client)
            for cell in notebook["cells"]
            if cell["cell_type"] == "code"
        ]
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)


def _run(code: str, client: Any) -> list[dict[str, Any]]:
    outputs: list[dict[str, Any]] = []

    def note(message: Mapping[str, Any]) -> None:
        kind, content = message["msg_type"], message["content"]
        if kind == "stream" and outputs and outputs[-1].get("name") == content["name"]:
            outputs[-1]["text"] += content["text"]
        elif kind == "stream":
            outputs.append({"output_type": kind, **content})
        elif kind in ("display_data", "execute_result"):
            shown = {"data": content["data"], "metadata": content["metadata"]}
            outputs.append({"output_type": "display_data", **shown})
        elif kind == "error":
            raise AssertionError("\n".join(content["traceback"]))

    client.execute_interactive(code, output_hook=note, timeout=120)
    return outputs


def _codes(outputs: object) -> set[str]:
    return set(re.findall(r"BN\d{3}", json.dumps(outputs)))


@pytest.mark.filterwarnings("ignore")
def test_the_tour_runs_and_shows_its_outputs(tmp_path):
    notebook = json.loads(TOUR.read_text("utf-8"))
    stored = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    now = outputs_of(notebook, tmp_path)
    assert [len(outputs) for outputs in now] == [len(outputs) for outputs in stored]
    assert _codes(now) == _codes(stored), "run: python -m tests.test_tour"


if __name__ == "__main__":
    tour = json.loads(TOUR.read_text("utf-8"))
    with tempfile.TemporaryDirectory() as name:
        ran = iter(outputs_of(tour, Path(name)))
    for cell in tour["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = next(ran)
    TOUR.write_text(json.dumps(tour, indent=1, ensure_ascii=False) + "\n", "utf-8")
