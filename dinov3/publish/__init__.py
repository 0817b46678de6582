"""The writing side of releases: build, gate, sign, describe, store."""
