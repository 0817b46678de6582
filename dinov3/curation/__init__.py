"""From a source of images to a curated dataset (paper, section 3.1)."""
