"""Upstream names: code written for mamba_ssm or causal_conv1d changes its import lines only."""
