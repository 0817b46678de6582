"""Whole processes: dvc, Dagster, training that is killed."""
