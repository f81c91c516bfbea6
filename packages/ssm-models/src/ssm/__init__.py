"""State-space models for PyTorch: operators, modules, models.  Importing it loads no backend."""

__version__ = "0.1.0"
