"""Evaluation protocols, one file each, and the report."""
