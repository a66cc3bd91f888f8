"""ResNet18 on CIFAR-100, the paper's setting (arXiv 2408.13787): baseline 77.8 %, MS 77.1–77.7 % (its Figure 3).

    msjax train --config configs/resnet18_cifar100.py --model.cut medium       # or deep: cuts 9 and 13
    msjax train --config configs/resnet18_cifar100.py --model.cut shallow --model.first-block paper

The paper's shallow cut, 2, lies inside the first residual block; its program takes the skip connection away there,
and so does `--model.first-block paper`. With the whole block on the client, "shallow" is cut 3.

Run time: not measured; meant for a GPU. The paper has ten clients; its program has one: --clients 1.
"""

from msjax.config import Config, DataConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(name="resnet18", cut="medium"),
        data=DataConfig(name="cifar100"),
        optim=OptimConfig(
            learning_rate=0.1, momentum=0.9, weight_decay=5e-4, schedule="steps", milestones=(60, 120, 160), gamma=0.2
        ),
        clients=10,
        batch_size=256,
        epochs=200,
    )
