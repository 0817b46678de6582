"""Heads on top of a backbone."""
