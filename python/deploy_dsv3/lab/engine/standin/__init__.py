"""A stand-in for LMDeploy: a simulator for the lab, never a model server.

The lab's engine image installs this package as `lmdeploy` beside the real Ray. README.md says what it
imitates and what it does not. Imports stay relative, so that it runs under either name.
"""

#: The LMDeploy release whose options, routes, bodies and metric names are imitated.
IMITATES = "0.18.0"

__version__ = f"{IMITATES}+standin"
