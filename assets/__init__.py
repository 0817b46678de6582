"""What exists: the lineage graph, one file per chapter."""
