"""Speed as ratios, measured in one run: sides take turns, so a busy machine slows all alike."""

from dinov3.bench.augmentation import FLOAT_TOLERANCE, augmentation_ratio, torchvision_chain
from dinov3.bench.pictures import DrawnImages

__all__ = ["FLOAT_TOLERANCE", "DrawnImages", "augmentation_ratio", "torchvision_chain"]
