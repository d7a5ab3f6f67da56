"""Losses: plain functions over tensors."""
