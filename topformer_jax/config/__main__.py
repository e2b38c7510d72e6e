"""Prints docs/settings.md."""

from topformer_jax.config.listing import as_markdown

print(as_markdown())
