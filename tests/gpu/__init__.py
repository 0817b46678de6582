"""What only an accelerator can show; skipped where there is none."""
