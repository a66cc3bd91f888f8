"""What a network is trained for: a loss a sample, and metrics that add up over batches.

    task = tasks.classification(label_smoothing=0.1)
    task = tasks.segmentation(num_classes=4)
    task = tasks.custom(loss=lambda outputs, labels: ..., metrics={"error": lambda outputs, labels: ...})

A loss takes the network's outputs and the labels of a batch and returns one value a sample, (B,). A metric does the
same and is averaged over samples, or is a `Metric`, whose sums add up in another way.
"""

from msjax.tasks._classification import classification, count_correct, cross_entropy, multi_label
from msjax.tasks._dense import next_token, segmentation
from msjax.tasks._regression import regression
from msjax.tasks._task import Metric, Task, custom, mean_of

TASKS = {
    "classification": classification,
    "multi_label": multi_label,
    "regression": regression,
    "segmentation": segmentation,
    "next_token": next_token,
}
"""The tasks by name, as the config and the command line name them."""

__all__ = [
    "TASKS",
    "Metric",
    "Task",
    "classification",
    "count_correct",
    "cross_entropy",
    "custom",
    "mean_of",
    "multi_label",
    "next_token",
    "regression",
    "segmentation",
]
