"""MkDocs hook: makes README.md the first page of the site, and links to files outside of docs/ plain text."""

import pathlib
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

README = pathlib.Path(__file__).parents[1] / "README.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds README.md as index.md, with its links as they are below docs/."""
    text = README.read_text().replace("](docs/", "](")
    files.append(
        File.generated(config, "index.md", content=re.sub(r"\[([^]]+)\]\((?!http)[A-Z]+(?:\.\w+)?\)", r"\1", text))
    )
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Lets links to README.md lead to the first page."""
    return markdown.replace("](../README.md", "](index.md")
