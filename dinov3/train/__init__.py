"""The trainer: one loop, phases by recipe."""
