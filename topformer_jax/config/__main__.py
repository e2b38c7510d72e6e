"""Prints docs/settings.md."""

from topformer_jax.config.settings import as_markdown

print(as_markdown())
