"""Reading, cropping and augmenting images."""
