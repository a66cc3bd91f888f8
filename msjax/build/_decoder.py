"""What a config says of a decoder."""

import json

from msjax import config, models
from msjax.paths import expand


def resolved(cfg: config.Config) -> config.Config:
    """Returns the config of a run with a decoder so that it says what the network is, wherever it is read.

    `model.decoder` becomes the text of config.json, and `data.tokenizer` the folder `model.weights`, where they are not
    given. Other configs are returned as they are.

    Raises:
      ValueError: there is no config.json, or it describes no decoder that is known.
    """
    if cfg.model.name != models.DECODER:
        return cfg
    described, weights = cfg.model.decoder, cfg.model.weights
    if described is None and weights is None:
        raise ValueError(
            "model.decoder or model.weights must say what model.name='decoder' is, got neither: give model.weights, a "
            "folder of Hugging Face's with config.json, model.safetensors and tokenizer.json; or model.decoder, a "
            "config.json, for weights that are drawn at random"
        )
    if described is None or not described.lstrip().startswith("{"):
        name = "model.weights" if described is None else "model.decoder"
        try:
            found = models.DecoderConfig.load(expand(name, weights if described is None else described))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        described = json.dumps(found.to_json())
    tokenizer = cfg.data.tokenizer
    if tokenizer is None and weights is not None and (expand("model.weights", weights) / "tokenizer.json").is_file():
        tokenizer = weights
    return config.with_fields(cfg, {"model.decoder": described, "data.tokenizer": tokenizer})


def decoder_config(cfg: config.Config) -> models.DecoderConfig:
    """Returns what a resolved config says of its decoder; raises ValueError where it says nothing that is known."""
    try:
        return models.DecoderConfig.from_json(json.loads(cfg.model.decoder or ""))
    except ValueError as error:
        raise ValueError(f"model.decoder must be the text of a config.json, but: {error}") from None


def takes_tokens(cfg: config.Config) -> bool:
    """Returns whether the network's inputs are tokens, which are no numbers to be normalised."""
    return cfg.model.name in (*models.TOKEN_MODELS, models.DECODER)
