"""`python -m lmdeploy`."""

from .cli import run

run()
