"""The reading side of lineage: standard library only."""
