"""LLM.int8(): 8-bit weights with a scale for each row.

Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", NeurIPS 2022.
What it stores are weights of 8 bits, the largest magnitude of a row at 127. When it runs it rounds
inputs to 8 bits too, all but the columns with values beyond 6, which it multiplies in 16 bits. That
saves time and no weight bytes, and is left out here.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from jlcm.methods.grid import as_rows
from jlcm.methods.network import Network, per_weight
from jlcm.methods.rex import round_rows
from jlcm.packed import StoredWeight
from jlcm.uniform import UniformWeight

BITS = 8


@dataclass(frozen=True, kw_only=True)
class LLMInt8:
    """Options of LLM.int8(): it has none that change what is stored."""


def llm_int8(network: Network, options: LLMInt8) -> dict[str, StoredWeight]:
    """Round every weight to 8 bits on a symmetric grid of its row."""
    network.notes.append(
        "inputs stay unrounded, where the method rounds all but outlier columns to 8 bits: its "
        "accuracy can only look better for it"
    )
    if set(network.bits.values()) - {BITS}:
        network.notes.append("weights have 8 bits, whatever alpha or bits ask for")

    def encode(weight: Tensor, bits: int) -> UniformWeight:
        stored = round_rows(as_rows(weight), bits, tuple(weight.shape), searched=False)
        stored.dtype = weight.dtype
        return stored

    return per_weight(replace(network, bits=dict.fromkeys(network.bits, BITS)), encode, "round")
