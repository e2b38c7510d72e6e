"""Which packages a wheel holds; everything else about the project is in pyproject.toml."""

from setuptools import find_packages, setup

# The recipes lie beside the package in a clone and inside it in a wheel: pyproject.toml can either find packages
# or name such a folder.
setup(
    packages=[*find_packages(include=["topformer_jax*"]), "topformer_jax.configs"],
    package_dir={"topformer_jax.configs": "configs"},
)
