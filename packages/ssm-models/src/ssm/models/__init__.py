"""Models: how many blocks, how wide, which of them share weights."""
