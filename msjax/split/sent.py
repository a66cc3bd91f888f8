"""What was sent, from a record of traffic (`Traffic.to_json` and the bytes of messages beside it); needs no JAX."""


def cut_bytes(traffic: dict[str, int]) -> int:
    """Returns the bytes of features and gradients, both ways over the cut; where entropy-coded, as messages."""
    if "coded_uplink_bytes" in traffic and not traffic["uplink_gradient_bytes"]:
        return traffic["coded_uplink_bytes"] + traffic["coded_downlink_bytes"]
    names = ("uplink_feature_bytes", "uplink_gradient_bytes", "downlink_feature_bytes", "downlink_gradient_bytes")
    return sum(traffic.get(name, 0) for name in names)


def total_bytes(traffic: dict[str, int]) -> int:
    """Returns all bytes of training, both ways; where entropy-coded, as messages."""
    _, up, down = as_sent(traffic)
    return up + down


def as_sent(traffic: dict[str, int]) -> tuple[int, int, int]:
    """Returns the bytes of the features up, of all up and of all down; where entropy-coded, as messages."""
    features, up, down = (traffic[name] for name in ("uplink_feature_bytes", "uplink_bytes", "downlink_bytes"))
    # U-shaped, features and gradients go both ways and are counted as one.
    if "coded_uplink_bytes" in traffic and not traffic["uplink_gradient_bytes"]:
        coded = traffic["coded_uplink_bytes"]
        up, features = up - features + coded, coded
        down += traffic["coded_downlink_bytes"] - traffic["downlink_gradient_bytes"]
    if "coded_uplink_synchronization_bytes" in traffic:
        up += traffic["coded_uplink_synchronization_bytes"] - traffic["uplink_synchronization_bytes"]
        down += traffic["coded_downlink_synchronization_bytes"] - traffic["downlink_synchronization_bytes"]
    return features, up, down
