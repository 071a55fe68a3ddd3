"""From a folder of images to augmented views on the training device."""
