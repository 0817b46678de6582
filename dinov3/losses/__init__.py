"""The training objectives, one file each."""
