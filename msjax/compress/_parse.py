"""Codecs as text: what `repr` prints, read back without `eval`."""

import ast

from msjax.compress._codec import Codec


def codec_from_string(text: str, codecs: tuple[type[Codec], ...]) -> Codec:
    """The codec that `text` names: `"MaskEncoded"` or `"MaskEncoded(ratio=0.99, bits=2)"`."""
    by_name = {cls.__name__: cls for cls in codecs}
    try:
        node = ast.parse(text.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        if not isinstance(call.func, ast.Name):
            raise ValueError("it does not begin with a name")
        cls = by_name[call.func.id]
        args = [ast.literal_eval(arg) for arg in call.args]
        options = {str(option.arg): ast.literal_eval(option.value) for option in call.keywords}
        if len(options) < len(call.keywords):
            raise ValueError("an option is given twice")
    except (SyntaxError, AttributeError, KeyError, ValueError, TypeError, RecursionError, MemoryError):
        raise ValueError(
            f"codec must be one of {', '.join(by_name)}, with options as in MaskEncoded(ratio=0.99, bits=2), "
            f"got {text!r}"
        ) from None
    try:
        return cls(*args, **options)
    except TypeError as error:
        raise ValueError(f"codec {text!r}: {error}") from None
