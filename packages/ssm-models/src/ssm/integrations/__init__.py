"""What connects the models with other programs."""
