"""DINOv3 as a system: the torch core. Imports nothing, so that reading records stays light."""

__version__ = "0.1.0"
