"""The reference operators."""
