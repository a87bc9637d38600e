"""`reasonkv train-gate`: train the gate of SeerAttention-R for a model."""


def train_gate() -> None:
    """Train the gate that the method seer chooses pages with."""
