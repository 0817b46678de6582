"""The reading side of lineage and releases: standard library, and `cryptography` for signatures."""
