"""From downloads to the layouts that data/sources.py reads: what `python -m topformer_jax.prepare` does."""
