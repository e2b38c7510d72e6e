"""Data of classification only: folders of classes, decoding, augmentation."""
