"""Smaller and faster models from trained ones, and what that costs: pruning, students, recipes, measurements."""
