"""``python -m dynaprune``: the command line of :mod:`dynaprune.cli`."""

from dynaprune.cli import app

app(prog_name="dynaprune")
