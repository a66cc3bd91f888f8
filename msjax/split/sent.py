"""What was sent, from a record of traffic (`Traffic.to_json` and the bytes of messages beside it); needs no JAX."""

_CUT = ("uplink_feature_bytes", "uplink_gradient_bytes", "downlink_feature_bytes", "downlink_gradient_bytes")
_SYNCHRONIZATION = ("uplink_synchronization_bytes", "downlink_synchronization_bytes")


def feature_bytes(traffic: dict[str, int]) -> int | None:
    """Returns the bytes of the features on their way up; where entropy-coded, as messages.

    None where that is not known: U-shaped gradients go up, too, and messages of both are counted as one.
    """
    if not is_coded(traffic):
        return traffic["uplink_feature_bytes"]
    return None if traffic.get("uplink_gradient_bytes") else traffic["coded_uplink_bytes"]


def cut_bytes(traffic: dict[str, int]) -> int:
    """Returns the bytes of features and gradients, both ways over the cut; where entropy-coded, as messages."""
    if is_coded(traffic):
        return traffic["coded_uplink_bytes"] + traffic["coded_downlink_bytes"]
    return sum(traffic.get(name, 0) for name in _CUT)


def other_bytes(traffic: dict[str, int]) -> int:
    """Returns the bytes of labels, and of what keeps the clients' parts equal; where entropy-coded, as messages."""
    return traffic["uplink_label_bytes"] + sum(traffic.get(f"coded_{name}", traffic[name]) for name in _SYNCHRONIZATION)


def total_bytes(traffic: dict[str, int]) -> int:
    """Returns all bytes of training, both ways; where entropy-coded, as messages."""
    return cut_bytes(traffic) + other_bytes(traffic)


def by_direction(traffic: dict[str, int]) -> tuple[int, int]:
    """Returns the bytes of all up and of all down; where entropy-coded, as messages."""
    up, down = traffic["uplink_bytes"], traffic["downlink_bytes"]
    if is_coded(traffic):
        plain = [sum(traffic.get(name, 0) for name in _CUT if name.startswith(way)) for way in ("up", "down")]
        up += traffic["coded_uplink_bytes"] - plain[0]
        down += traffic["coded_downlink_bytes"] - plain[1]
    if "coded_uplink_synchronization_bytes" in traffic:
        up += traffic["coded_uplink_synchronization_bytes"] - traffic["uplink_synchronization_bytes"]
        down += traffic["coded_downlink_synchronization_bytes"] - traffic["downlink_synchronization_bytes"]
    return up, down


def is_coded(traffic: dict[str, int]) -> bool:
    """Whether bytes of features and gradients are those of messages, entropy-coded, and not those of payloads."""
    return "coded_uplink_bytes" in traffic
