"""Synthos trains conditional image models on a Slurm cluster; this package is all that runs on a GPU node."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`synthos.load` without paying for torch when only the version is wanted."""
    if name == "load":
        from synthos.generate import load

        return load
    raise AttributeError(f"module 'synthos' has no attribute {name!r}")
