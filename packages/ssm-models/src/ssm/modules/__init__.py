"""Model logic: every file here owns parameters and composes the operators of ``ssm.ops``."""
