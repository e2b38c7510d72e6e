"""Speed, each thing beside its peer: `python -m topformer_jax.benchmark`, a file a measurement."""
