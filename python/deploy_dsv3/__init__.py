"""deploy-dsv3: take bare GPU servers to a served, verified DeepSeek-V3 on LMDeploy."""

__version__ = "0.1.0"
