"""The table of settings as text, for --help-config, and as Markdown, for docs/settings.md."""

from typing import Any

from topformer_jax.config.settings import GROUPS, Setting


def as_typed(value: Any) -> str:
    """A setting's value as one writes it on the command line, where a shell needs quotes around a tuple.

    >>> as_typed((480, 360)), as_typed(True), as_typed(None)
    ('(480,360)', 'true', 'none')
    """
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value).replace(", ", ",") if isinstance(value, tuple) else str(value)


def as_text() -> str:
    """The table for a terminal."""
    lines = ["Every setting with its default; change one by --config.KEY=VALUE."]
    for title, group in GROUPS.items():
        lines += ["", title]
        for key, row in group.items():
            lines += [f"  {key}={as_typed(row.default)}", f"      {row.meaning} [{row.expected}]"]
    return "\n".join(lines)


def as_markdown() -> str:
    """The table as docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "`python -m topformer_jax.config > docs/settings.md` makes this page from the table in",
        "`topformer_jax/config/settings.py`; `--help-config` of any command prints it too. The defaults are those of",
        "`config.base_config()`; recipes change some of them. To change one, add `--config.KEY=VALUE` to a command,",
        '`load(..., **{"KEY": VALUE})` in Python, or an assignment in a config file.',
    ]
    for title, group in GROUPS.items():
        lines += [
            "",
            f"## {title}",
            "",
            "| setting | default | legal values | meaning |",
            "|---|---|---|---|",
        ]
        lines += [_markdown_row(key, row) for key, row in group.items()]
    return "\n".join(lines)


def _markdown_row(key: str, row: Setting) -> str:
    default = as_typed(row.default)
    cells = (f"`{key}`", f"`{default}`" if default else "", row.expected, row.meaning)
    return f"| {' | '.join(cells)} |".replace("<", "&lt;")
