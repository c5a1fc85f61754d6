"""The notebooks run from top to bottom, and say what is true; what they print and draw is committed with them.

They run here with a short training (`GEMLET_NOTEBOOK_STEPS`). The committed outputs are those of a full run:

    cd notebooks && jupyter execute --inplace build_gemma_from_scratch.ipynb your_own_text.ipynb
"""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parent.parent / "notebooks"
WALKTHROUGH, OWN_TEXT = "build_gemma_from_scratch.ipynb", "your_own_text.ipynb"
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/(home|root|tmp|usr|opt|work|var|private|Users|content|kaggle)/|[A-Z]:\\")


class Executed:
    """The outputs of a notebook, by the id of the cell."""

    def __init__(self, notebook: Any):
        self.cells = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}

    def text(self, cell: str) -> str:
        return "".join(o.text for o in self.cells[cell] if o.output_type == "stream" and o.name == "stdout")

    def everything(self) -> str:
        return "\n".join(
            str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", ""))
            for outputs in self.cells.values()
            for o in outputs
        )

    def complaints(self) -> list[str]:
        wrong = {"error", "stderr"}
        return [
            f"{cell}: {o.get('text', o.get('evalue'))}"
            for cell, outputs in self.cells.items()
            for o in outputs
            if {o.output_type, o.get("name")} & wrong
        ]

    def pictures(self) -> set[str]:
        return {cell for cell, outputs in self.cells.items() if any("image/png" in o.get("data", {}) for o in outputs)}

    def number(self, cell: str, pattern: str) -> float:
        found = re.search(pattern, self.text(cell))
        assert found, f"{cell} does not print {pattern}: {self.text(cell)}"
        return float(found[1])


def read(name: str) -> Any:
    return nbformat.read(FOLDER / name, as_version=4)


def client(notebook: Any, folder: Path) -> NotebookClient:
    return NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        coalesce_streams=True,
    )


@pytest.fixture(autouse=True)
def short_trainings_without_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMLET_NOTEBOOK_STEPS", "60")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_the_walkthrough_runs_and_what_it_claims_is_so(tmp_path):
    walkthrough = Executed(client(read(WALKTHROUGH), tmp_path).execute())
    it_draws_its_pictures_without_a_complaint(walkthrough)
    every_part_equals_gemlets_and_transformers(walkthrough)
    what_others_get_wrong_is_measured(walkthrough)
    a_short_training_learns_and_tells_a_story(walkthrough)
    the_committed_outputs_are_of_the_committed_code(walkthrough)


def it_draws_its_pictures_without_a_complaint(walkthrough: Executed):
    assert walkthrough.complaints() == []
    assert walkthrough.pictures() == Executed(read(WALKTHROUGH)).pictures()
    assert not ABSOLUTE_PATH.search(walkthrough.everything())


def every_part_equals_gemlets_and_transformers(walkthrough: Executed):
    printed = re.findall(
        r"^(.+?)  +(gemlet|transformers|torch) +largest difference (\S+)$", walkthrough.everything(), re.M
    )
    assert all(float(difference) < 1e-5 for _, _, difference in printed)
    with_gemlet = {part for part, other, _ in printed if other == "gemlet"}
    assert with_gemlet >= {
        "embedding", "tied head", "RMSNorm", "RoPE, base 10,000", "RoPE, base 1,000,000", "mask, window None",
        "mask, window 8", "sliding attention", "full attention", "GeGLU", "block", "the whole model",
        "token by token", "cross-entropy", "temperature: 0.5", "top_k: 4", "top_p: 0.8",
    }  # fmt: skip
    with_transformers = {part for part, other, _ in printed if other == "transformers"}
    assert with_transformers >= {"embedding", "RMSNorm", "sliding attention", "GeGLU", "block", "the whole model"}
    assert walkthrough.number("trained", r"largest difference (\S+)") < 1e-3


def what_others_get_wrong_is_measured(walkthrough: Executed):
    counted = walkthrough.text("budget")
    assert all(count in counted for count in ("268,098,176", "132,490,496", "164,654,976"))
    assert "128 tokens: the window changes the logits of 0 tokens by at most 0.0e+00" in walkthrough.text(
        "masks-measured"
    )
    assert walkthrough.number("bf16-picture", r"bfloat16 weights .*; +(\d+)%") < 50
    assert walkthrough.number("bf16-picture", r"float32 weights .*; +(\d+)%") > 99
    assert walkthrough.number("rising-verdict", r"rising is better by (\S+)") > 0
    assert walkthrough.number("rising-verdict", r"rising is worse by +(\S+)") > 0
    assert walkthrough.number("end", r"with end tokens .*: (\S+)") > 0.5
    assert walkthrough.number("end", r"without .*: (\S+)") < 0.1
    assert "the same with and without the cache" in walkthrough.text("saves")


def a_short_training_learns_and_tells_a_story(walkthrough: Executed):
    assert walkthrough.number("result", r"loss: (\S+) nats") < 2.2  # 7.4 for knowing nothing
    assert walkthrough.text("story").startswith("Once upon a time") and len(walkthrough.text("story").split()) > 20


def the_committed_outputs_are_of_the_committed_code(walkthrough: Executed):
    committed = Executed(read(WALKTHROUGH))
    same = ["data", "tokens", "configuration", "masks", "masks-measured", "budget", "loss", "rope-bases-picture"]
    assert {cell: committed.text(cell) for cell in same} == {cell: walkthrough.text(cell) for cell in same}
    assert "1,000 steps" in committed.text("settings")


def test_your_own_text_runs_twice_in_one_kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMLET_NOTEBOOK_STEPS", "24")  # nothing below asks how much it has learned
    notebook = read(OWN_TEXT)
    executor = client(notebook, tmp_path)
    with executor.setup_kernel():
        for round in (1, 2):
            for index, cell in enumerate(notebook.cells):
                executor.execute_cell(cell, index)
            executed = Executed(notebook)
            assert executed.complaints() == [], f"round {round}"
            assert executed.number("use", r"largest difference (\S+)") < 1e-3
            assert "the same greedy text: True" in executed.text("use")
            assert ".gguf" in executed.text("export") and "model.safetensors" in executed.text("export")
            assert not ABSOLUTE_PATH.search(executed.everything())


@pytest.mark.parametrize(("name", "cell"), [(WALKTHROUGH, "story"), (OWN_TEXT, "listen")])
def test_cells_in_the_wrong_order_give_a_sentence(name, cell, tmp_path):
    notebook = read(name)
    executor = client(notebook, tmp_path)
    index = {c.id: i for i, c in enumerate(notebook.cells)}
    with executor.setup_kernel():
        executor.execute_cell(notebook.cells[index["setup"]], index["setup"])
        late = notebook.cells[index[cell]]
        with pytest.raises(CellExecutionError):
            executor.execute_cell(late, index[cell])
    assert [o.text for o in late.outputs if o.output_type == "stream"] != []
    said = "".join(o.text for o in late.outputs if o.get("name") == "stderr")
    assert re.fullmatch(r"There is no \w+ yet\. Run the cells above first \(Run > Run All Above\)\.\n", said)


@pytest.mark.parametrize("name", [WALKTHROUGH, OWN_TEXT])
def test_a_committed_notebook_is_whole(name):
    assert (FOLDER / name).stat().st_size < 3_000_000
    notebook = read(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), (
        "run top to bottom, in a new kernel"
    )
    assert all(re.fullmatch(r"[a-z0-9-]+", cell.id) for cell in notebook.cells)
    executed = Executed(notebook)
    assert executed.complaints() == [] and not ABSOLUTE_PATH.search(executed.everything())
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


@pytest.mark.parametrize("name", [WALKTHROUGH, OWN_TEXT])
def test_links_of_a_notebook_lead_somewhere(name):
    text = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    local = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert local and [link for link in local if not (FOLDER / link).exists()] == []
