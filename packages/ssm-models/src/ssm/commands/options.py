"""Choices that several commands offer."""

DTYPES = ("float32", "bfloat16", "float16", "float64")
