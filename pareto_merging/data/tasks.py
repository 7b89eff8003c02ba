"""One task: its images, and the head that reads the encoder's features."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.data import Dataset


@dataclass
class Task:
    """One task's images and its frozen head, as merging and evaluation see it.

    Attributes:
        images: a map-style dataset of image tensors or of (image, anything) pairs; evaluation and supervised training
            want (image, label).
        head: maps features to logits [n, classes].
    """

    images: Dataset[Any]
    head: nn.Module
