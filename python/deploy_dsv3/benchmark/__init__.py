"""Measure the deployed service as the upstream guide does, and set the figures beside the published ones.

The parts, from data to page: `profiles` (which rows), `workload` (what each request asks for), `client` (the
load generator), `figures` (upstream's formulas), `runs` (the folder that survives a kill), `worker` (the
process that measures), `supervision` (start it here or on the head and follow it), `comparison` (two runs, a
verdict per row), `page` (HTML and Markdown), `commands` (the command line).

`worker` and what it imports also run inside the engine's container on the head (Python 3.10 or newer, numpy
and aiohttp from the image), so those modules use nothing newer and nothing else.
"""
