"""How Sphinx makes the site from the pages beside this folder: `make docs`. Reading the site needs no network either.

The pages are plain Markdown, which reads well where there is no site, too. What only the site has is put in here, while
the pages are read: the order of the pages, the parts that are generated from the code, the diagrams as pictures.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

import mmdr
from sphinx.application import Sphinx

HERE = Path(__file__).parent
DOCS = HERE.parent
sys.path.insert(0, str(HERE))

import reference  # noqa: E402

project = "gemlet"
author = "the gemlet authors"
copyright = "the gemlet authors, Apache-2.0"
release = metadata.version("gemlet")

extensions = ["myst_parser"]
exclude_patterns = ["site"]
myst_heading_anchors = 3
smartquotes = False  # a flag named in a docstring, --resume, would lose a hyphen

html_theme = "furo"
html_title = "gemlet"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["copy.js"]
html_copy_source = False
html_show_sphinx = False
maximum_signature_line_length = 88

NAVIGATION = {
    "Start": ["quickstart", "recipes", "faq"],
    "Concepts": [
        f"concepts/{page}"
        for page in (
            "tokens",
            "model",
            "attention",
            "training",
            "plan",
            "learning-rate",
            "checkpoints",
            "generation",
            "engine",
            "scores",
        )
    ],
    "Reference": ["reference/commands", "reference/configuration", "reference/python"],
    "Project": ["architecture", "internals/performance", "decisions", "results"],
}
"""The pages in order; one that is not there (yet) is left out."""


def navigation() -> str:
    """`NAVIGATION` as the home page's tables of contents."""
    trees = []
    for caption, pages in NAVIGATION.items():
        there = "\n".join(page for page in pages if (DOCS / f"{page}.md").is_file())
        trees.append(f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{there}\n```")
    return "\n\n".join(trees)


def drawn(diagram: re.Match[str]) -> str:
    """A mermaid fence as an SVG picture in the page."""
    svg = mmdr.render(diagram[1]).svg()
    return f'<div class="diagram" role="img">{" ".join(svg.split())}</div>'


def needed(comment: re.Match[str]) -> str:
    """`<!-- needs: the network -->` before a fence, as a label that the reader sees."""
    return f'<p class="needs">needs {comment[1]}</p>\n'


def prepare(app: Sphinx, page: str, source: list[str]) -> None:
    """Put into a page what only the site has."""
    text = source[0]
    text = re.sub(r"^```mermaid\n(.*?)^```$", drawn, text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^<!-- needs: (.*) -->$", needed, text, flags=re.MULTILINE)
    text = re.sub(r"^<!-- generated: (.*) -->$", lambda found: reference.generated(found[1]), text, flags=re.MULTILINE)
    source[0] = f"{text}\n\n{navigation()}\n" if page == "index" else text


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", prepare)
