"""Model FLOP utilisation: what share of the devices' peak a throughput is. Imports no JAX."""

import re

from config import VOCABULARY, Config

# Dense bfloat16 FLOP/s of a device, by the words of its kind; the first that fits.
PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
}


def per_token(config: Config) -> int:
    """Model FLOPs of a token of training: 6 x active parameters + 6 x layers x seq_len x d_model.

    Active parameters are those of the matrices that a token is multiplied by: attention (4 d_model^2), router
    (d_model x experts) and top_k experts (3 d_model x d_expert each) of every layer, and the head (d_model x
    vocabulary). A parameter takes 2 FLOPs forward and 4 backward. The second term is that of attention's products with
    keys and with values, of which a token sees half of the sequence in the mean: 2 x 2 x seq_len / 2 x d_model forward,
    and three times that with the backward pass. What is computed again (--remat) does not count.
    """
    model = config.model
    experts = model.d_model * model.experts + model.top_k * 3 * model.d_model * model.d_expert
    active = model.layers * (4 * model.d_model**2 + experts) + model.d_model * VOCABULARY
    return 6 * active + 6 * model.layers * config.data.seq_len * model.d_model


def peak(kind: str) -> float | None:
    """FLOP/s of a device of this kind, as JAX calls it; None where that is not known, as of a part of a GPU (MIG)."""
    whole = not re.search(r"\bMIG\b", kind)
    return next((flops for name, flops in PEAKS.items() if whole and re.search(rf"\b{name}\b", kind)), None)


def utilisation(config: Config, tokens_per_s: float | None, devices: int, kind: str) -> float | None:
    """MFU, 0 to 1; None where the throughput or the devices' peak is not known."""
    of_each = peak(kind)
    if tokens_per_s is None or of_each is None:
        return None
    return tokens_per_s * per_token(config) / (devices * of_each)
