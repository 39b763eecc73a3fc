"""Value-to-output permutation groups inside attention heads.

Within one head the output is a weighted sum of value vectors, so the channels of the value
projection may be permuted if the matching input columns of the output projection follow. The rules
go by the names and shapes of the projections; `jlcm.reorder` checks their result numerically.
"""

from collections.abc import Iterator

from torch import nn

from jlcm.permutation import Member, PermutationGroup

_PROJECTION_NAMES = (  # query, key, value
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
_OUTPUT_NAMES = ("o_proj", "out_proj", "to_out.0", "to_out", "proj", "wo", "out_lin", "dense", "o")
_HEAD_COUNT_NAMES = ("num_heads", "heads", "n_heads", "num_attention_heads", "n_head")
_HEAD_SIZE_NAMES = ("head_dim", "attention_head_size")


def attention_modules(model: nn.Module) -> list[str]:
    """Names of the innermost attention modules, whether or not their layout is understood.

    They are recognised by their projections or by their class name.
    """
    found = [name for name, module in model.named_modules() if _is_attention(module)]
    return [
        name
        for name in found
        if not any(other != name and (not name or other.startswith(f"{name}.")) for other in found)
    ]


def head_groups(model: nn.Module, name: str) -> list[PermutationGroup]:
    """One candidate group per value head of the attention module `name`.

    Understands `torch.nn.MultiheadAttention`, fused ``qkv`` projections laid out as (3, heads,
    head size) with an output projection ``proj``, and separate projections named as in Llama, BERT
    or diffusers, grouped-query attention included. Other layouts give an empty list.
    """
    module = model.get_submodule(name)
    if isinstance(module, nn.MultiheadAttention):
        return _multihead_groups(module, f"{name}." if name else "")
    if isinstance(getattr(module, "qkv", None), nn.Linear):
        return _fused_groups(module, f"{name}." if name else "")
    return _separate_groups(model, module, name)


def _is_attention(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.MultiheadAttention)
        or "attention" in type(module).__name__.lower()
        or isinstance(getattr(module, "qkv", None), nn.Linear)
        or _separate_projections(module) is not None
    )


def _multihead_groups(module: nn.MultiheadAttention, prefix: str) -> list[PermutationGroup]:
    if module.in_proj_weight is not None:
        weight, first = "in_proj_weight", 2 * module.embed_dim
    else:
        weight, first = "v_proj_weight", 0
    groups = []
    for head in range(module.num_heads):
        offset = head * module.head_dim
        members = [
            Member(name=prefix + weight, dim=0, start=first + offset),
            Member(name=f"{prefix}out_proj.weight", dim=1, start=offset),
        ]
        if module.in_proj_bias is not None:
            start = 2 * module.embed_dim + offset
            members.append(Member(name=f"{prefix}in_proj_bias", dim=0, start=start))
        if module.bias_v is not None:
            members.append(Member(name=f"{prefix}bias_v", dim=2, start=offset))
        groups.append(_group(members, module.head_dim))
    return groups


def _fused_groups(module: nn.Module, prefix: str) -> list[PermutationGroup]:
    output = getattr(module, "proj", None)
    heads = _first_int(module, ("num_heads", *_HEAD_COUNT_NAMES))
    width = module.qkv.out_features // 3
    if not isinstance(output, nn.Linear) or output.in_features != width:
        return []
    if not heads or module.qkv.out_features % (3 * heads):
        return []
    size = width // heads
    groups = []
    for head in range(heads):
        start = 2 * width + head * size
        members = [
            Member(name=f"{prefix}qkv.weight", dim=0, start=start),
            Member(name=f"{prefix}proj.weight", dim=1, start=head * size),
        ]
        if module.qkv.bias is not None:
            members.append(Member(name=f"{prefix}qkv.bias", dim=0, start=start))
        if isinstance(getattr(module, "v_bias", None), nn.Parameter):  # BEiT: outside the Linear
            members.append(Member(name=f"{prefix}v_bias", dim=0, start=head * size))
        groups.append(_group(members, size))
    return groups


def _separate_groups(model: nn.Module, module: nn.Module, name: str) -> list[PermutationGroup]:
    projections = _separate_projections(module)
    if projections is None:
        return []
    query, value = getattr(module, projections[0]), getattr(module, projections[2])
    heads = _first_int(module, _HEAD_COUNT_NAMES)
    size = _first_int(module, _HEAD_SIZE_NAMES) or (query.out_features // heads if heads else None)
    if not size or value.out_features % size or query.out_features % value.out_features:
        return []
    repeats = query.out_features // value.out_features  # query heads that share one value head
    output = next(_output_candidates(model, name, query.out_features), None)
    if output is None:
        return []
    weight = f"{name}.{projections[2]}" if name else projections[2]
    groups = []
    for head in range(value.out_features // size):
        members = [Member(name=f"{weight}.weight", dim=0, start=head * size)]
        if value.bias is not None:
            members.append(Member(name=f"{weight}.bias", dim=0, start=head * size))
        for query_head in range(head * repeats, (head + 1) * repeats):
            members.append(Member(name=f"{output}.weight", dim=1, start=query_head * size))
        groups.append(_group(members, size))
    return groups


def _separate_projections(module: nn.Module) -> tuple[str, str, str] | None:
    for names in _PROJECTION_NAMES:
        if all(isinstance(getattr(module, name, None), nn.Linear) for name in names):
            return names
    return None


def _output_candidates(model: nn.Module, name: str, width: int) -> Iterator[str]:
    """Names of output projections: in the module itself, or beside it as in BERT."""
    parent = name.rpartition(".")[0]
    for owner, suffixes in ((name, _OUTPUT_NAMES), (parent, ("output.dense",))):
        for suffix in suffixes:
            path = f"{owner}.{suffix}" if owner else suffix
            try:
                output = model.get_submodule(path)
            except AttributeError:
                continue
            if isinstance(output, nn.Linear) and output.in_features == width:
                yield path


def _first_int(module: nn.Module, names: tuple[str, ...]) -> int | None:
    values = (getattr(module, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _group(members: list[Member], size: int) -> PermutationGroup:
    return PermutationGroup(
        producer=members[0].name, start=members[0].start, size=size, members=tuple(members)
    )
