"""What a decoder of the Llama family is, as the config.json of Hugging Face says it."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from msjax.models._rope import RopeScaling

FAMILIES = ("llama", "qwen2", "qwen3")
"""The values of `model_type` that are known: Llama 1 to 3, Qwen 2 and 2.5, Qwen 3."""
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
# What would change what is computed, and the values that do not.
_UNCHANGED = {
    "hidden_act": ("silu",),
    "attention_dropout": (0,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1,),
    "quantization_config": (None,),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder of the Llama family; the fields are those of Hugging Face's config.json, with its defaults.

    Attributes:
      model_type: one of `FAMILIES`: "qwen2" has biases in front of the attention, "qwen3" normalises queries and keys.
      vocab_size: how many tokens there are.
      hidden_size: features between the blocks.
      intermediate_size: features within the feed-forward network.
      num_hidden_layers: how many blocks.
      num_attention_heads, num_key_value_heads: of queries, and of keys and values, which groups of queries share.
      head_dim: features of one head; by default `hidden_size / num_attention_heads`, of Qwen 3 128.
      max_position_embeddings: the longest text in tokens.
      rms_norm_eps: what is added to a mean square.
      rope_theta, rope_scaling: of the rotary positions.
      tie_word_embeddings: whether the output layer's weights are the embedding's.
      attention_bias, mlp_bias: biases of Llama's (and Qwen 3's) attention and feed-forward network.
      bos_token_id: the token with which a text begins, if there is one.
      eos_token_id: that with which one ends, or several that may end one.

    Raises:
      ValueError: a field has a value that is not allowed.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    num_key_value_heads: int = 0
    head_dim: int = 0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self):
        if self.model_type not in FAMILIES:
            raise ValueError(f"model_type must be one of {', '.join(FAMILIES)}, got {self.model_type!r}")
        for name in _REQUIRED:
            _check_integer(name, getattr(self, name))
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if not self.head_dim:
            default = 128 if self.model_type == "qwen3" else self.hidden_size // self.num_attention_heads
            object.__setattr__(self, "head_dim", default)
        for name in ("num_key_value_heads", "head_dim"):
            _check_integer(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads, {self.num_attention_heads}, got "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, as rotary positions turn pairs, got {self.head_dim}")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number above 0, got {value!r}")
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.mlp_bias and self.model_type != "llama":
            raise ValueError(f"mlp_bias must be false for model_type {self.model_type!r}, got true")
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise ValueError(f"rope_scaling must be a RopeScaling or None, got {self.rope_scaling!r}")
        if isinstance(ends := self.eos_token_id, list | tuple):
            object.__setattr__(self, "eos_token_id", tuple(ends) if len(ends) > 1 else ends[0] if ends else None)
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, tuple) else (value,):
                if token is not None and not (type(token) is int and 0 <= token < self.vocab_size):
                    raise ValueError(f"{name} must be a token in 0..{self.vocab_size - 1}, got {token!r}")

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Tokens behind which a text goes on no more: those that end it, and the one with which the next begins."""
        ends = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        return tuple(token for token in (*ends, self.bos_token_id) if token is not None)

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have a bias."""
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def output_bias(self) -> bool:
        """Whether the attention's output layer has a bias."""
        return self.attention_bias and self.model_type != "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether each head's queries and keys are normalised."""
        return self.model_type == "qwen3"

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "DecoderConfig":
        """Returns the decoder that the fields of a config.json describe; fields without a meaning here are ignored.

        Raises:
          ValueError: the `model_type` is not known, or a field is missing or has a value that is not supported.
        """
        if not isinstance(tree, Mapping):
            raise ValueError(f"config.json must be an object with fields, got {type(tree).__name__}")
        if tree.get("model_type") not in FAMILIES:
            raise ValueError(f"model_type must be one of {', '.join(FAMILIES)}, got {tree.get('model_type')!r}")
        for name in _REQUIRED:
            if tree.get(name) is None:
                raise ValueError(f"{name} must be given, got none")
        for name, allowed in _UNCHANGED.items():
            if tree.get(name) not in (None, *allowed):
                raise ValueError(f"{name} must be {json.dumps(allowed[0])}, got {json.dumps(tree[name])}")
        for kind in tree.get("layer_types") or ():
            if kind != "full_attention":
                raise ValueError(f'layer_types must be "full_attention" throughout, got {kind!r}')
        fields = {f.name for f in dataclasses.fields(cls)} & {name for name in tree if tree[name] is not None}
        values = {name: tree[name] for name in fields - {"rope_scaling", "rope_theta"}}
        return cls(**values, **_rope(tree))

    def to_json(self) -> dict[str, Any]:
        """Returns the fields of a config.json, such as `from_json` and the package transformers read."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.rope_scaling is not None:
            values["rope_scaling"] = {"rope_type": "llama3", **dataclasses.asdict(self.rope_scaling)}
        if self.model_type == "qwen2":  # which has no such fields
            del values["attention_bias"]
        if self.model_type != "llama":
            del values["mlp_bias"]
        return {"architectures": [_ARCHITECTURES[self.model_type]], **values, "hidden_act": "silu"}

    @classmethod
    def load(cls, path: str | os.PathLike) -> "DecoderConfig":
        """Reads a config.json, or that of a folder.

        Raises:
          ValueError: there is none, it is no JSON, or describes no decoder that is known; the file is named.
        """
        path = pathlib.Path(path).expanduser()
        path = path / "config.json" if path.is_dir() else path
        try:
            return cls.from_json(json.loads(path.read_text("utf-8")))
        except OSError as error:
            wanted = "a config.json that can be read, or a folder of Hugging Face's that has one"
            raise ValueError(f"{path} must be {wanted}: {error.strerror}") from None
        except ValueError as error:  # also what is no JSON, or no UTF-8
            raise ValueError(f"{path}: {error}") from None


def _rope(tree):
    """`rope_theta` and `rope_scaling`, which newer files keep together as `rope_parameters`."""
    together = tree.get("rope_parameters") or {}
    scaling = together or tree.get("rope_scaling") or {}
    theta = together.get("rope_theta", tree.get("rope_theta"))
    found = {} if theta is None else {"rope_theta": theta}
    kind = scaling.get("rope_type", scaling.get("type", None if "factor" in scaling else "default"))
    if kind == "llama3":
        names = [f.name for f in dataclasses.fields(RopeScaling)]
        if missing := [name for name in names if name not in scaling]:
            raise ValueError(f"rope_scaling must have {', '.join(names)}, got it without {missing[0]}")
        found["rope_scaling"] = RopeScaling(**{name: scaling[name] for name in names})
    elif kind != "default":
        raise ValueError(f'rope_scaling must have rope_type "default" or "llama3", got {json.dumps(kind)}')
    if scaling.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor must be 1, got {scaling['partial_rotary_factor']}")
    return found


def _check_integer(name, value):
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
