"""Both attention back ends against the textbook formula, in every shape the architectures need."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from penstock.engine.attention import AttentionBackend, PagedCpuAttention, SequenceRows, TorchAttention
from penstock.engine.kernels import load_kernels
from penstock.engine.kv_store import KVStore
from penstock.models.config import ModelConfig, RopeConfig

LENGTHS = (1, 15, 16, 17, 100, 300)


def config_of(
    heads: int, kv_heads: int, head_dim: int, window: int | None, softcap: float | None
) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        vocab=32,
        hidden=32,
        layers=1,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=32,
        context_len=1024,
        norm_eps=1e-5,
        layer_rope=(RopeConfig(10000.0),),
        sliding_window=(window,),
        attention_scale=head_dim**-0.5,
        attention_softcap=softcap,
    )


def backend_of(name: str, config: ModelConfig, store: KVStore) -> AttentionBackend:
    if name == "torch":
        return TorchAttention(config, store)
    kernels = load_kernels()
    if kernels is None:
        pytest.skip("the compiled kernels are not built here")
    return PagedCpuAttention(config, store, kernels)


def textbook(config: ModelConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[length, heads, dim] each; float64, one (row, head) after the other."""
    length, heads, _ = q.shape
    group = heads // config.kv_heads
    out = torch.zeros_like(q, dtype=torch.float64)
    window = config.sliding_window[0] or length
    for row in range(length):
        first = max(0, row - window + 1)
        for head in range(heads):
            keys, values = (
                k[first : row + 1, head // group].double(),
                v[first : row + 1, head // group].double(),
            )
            scores = keys @ q[row, head].double() * config.attention_scale
            if config.attention_softcap:
                scores = config.attention_softcap * torch.tanh(scores / config.attention_softcap)
            out[row, head] = torch.softmax(scores, 0) @ values
    return out


@pytest.mark.parametrize("name", ["torch", "paged-cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window", "softcap"),
    [
        (9, 3, 64, None, None),
        (4, 4, 16, None, None),
        (8, 1, 128, None, None),
        (2, 1, 256, None, 50.0),
        (4, 2, 32, 7, None),
        (4, 2, 32, 40, 20.0),
    ],
)
def test_agrees_with_the_textbook(
    name: str,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None,
    softcap: float | None,
) -> None:
    config = config_of(heads, kv_heads, head_dim, window, softcap)
    store = KVStore(config, 64, 16, dtype, torch.device("cpu"))
    store.k.fill_(torch.nan)
    store.v.fill_(torch.nan)
    backend = backend_of(name, config, store)
    generator = torch.Generator().manual_seed(1)
    blocks = iter(torch.randperm(64, generator=generator).tolist())
    tables = [[next(blocks) for _ in range(-(-length // 16))] for length in LENGTHS]
    full = [
        tuple(
            torch.randn(length, n, head_dim, generator=generator).to(dtype)
            for n in (heads, kv_heads, kv_heads)
        )
        for length in LENGTHS
    ]
    # Three mixed steps: all but two rows, then one row, then the last one.
    cuts = [[max(0, length - 2), max(0, length - 1), length] for length in LENGTHS]
    got: list[list[Tensor]] = [[] for _ in LENGTHS]
    for step in range(3):
        items, parts = [], []
        for index, cut in enumerate(cuts):
            start = cut[step - 1] if step else 0
            if cut[step] > start:
                first_row = sum(part[0].shape[0] for part in parts)
                items.append(SequenceRows(first_row, cut[step] - start, start, tables[index]))
                parts.append(tuple(tensor[start : cut[step]] for tensor in full[index]))
        q, k, v = (torch.cat([part[i] for part in parts]) for i in range(3))
        out = backend.plan(items, 2).attend(0, q, k, v)
        owners = [index for index, cut in enumerate(cuts) if cut[step] > (cut[step - 1] if step else 0)]
        for item, owner in zip(items, owners, strict=True):
            got[owner].append(out[item.first_row : item.first_row + item.count])
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    for (q, k, v), pieces in zip(full, got, strict=True):
        expected = textbook(config, q, k, v)
        torch.testing.assert_close(torch.cat(pieces).double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("change", [{"head_dim": 24}, {"head_dim": 288}])
def test_the_kernels_refuse_shapes_they_do_not_take(change: dict[str, int]) -> None:
    from penstock.engine.attention import make_attention

    config = replace(config_of(2, 1, 32, None, None), **change)
    store = KVStore(config, 4, 16, torch.float32, torch.device("cpu"))
    assert make_attention(config, store).name == "torch"


def test_extreme_scores_stay_finite() -> None:
    config = config_of(2, 1, 16, None, None)
    store = KVStore(config, 4, 16, torch.float32, torch.device("cpu"))
    for name in ("torch", "paged-cpu"):
        backend = backend_of(name, config, store)
        q = torch.full((20, 2, 16), 300.0)
        k = torch.linspace(-300, 300, 20)[:, None, None].expand(20, 1, 16).contiguous()
        v = torch.arange(20.0)[:, None, None].expand(20, 1, 16).contiguous()
        out = backend.plan([SequenceRows(0, 20, 0, [2, 1])], 2).attend(0, q, k, v)
        torch.testing.assert_close(out[:, 0, 0], torch.arange(20.0))
