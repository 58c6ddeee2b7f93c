"""Cut programs whose export needs help: they go to ONNX and agree with torch there."""

import pytest
import torch
from kiridashi_server.export.onnx import contiguous_attention
from kiridashi_server.graph import Plan, capture, cut, track
from torch import Tensor, nn
from torch.nn import functional


class MaskedAttention(nn.Module):
    """Fused attention with a learnt bias for each pair of places, its result reshaped at once."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 72), nn.Linear(24, 4)
        self.bias = nn.Parameter(torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (3, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = functional.scaled_dot_product_attention(query, key, value, self.bias.expand(x.shape[0], -1, -1, -1))
        return self.out(y.transpose(1, 2).reshape(x.shape[0], 5, -1))


def test_attention_with_a_bias_goes_to_onnx() -> None:
    runtime = pytest.importorskip("onnxruntime")
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
    program = capture(MaskedAttention(), x)
    tracking = track(program)
    small = cut(program, tracking, Plan.of(tracking.layout, {"qkv:head": (0, 2)}))
    exported = torch.onnx.export(
        contiguous_attention(torch.export.export(small, (x,))), dynamo=True, optimize=True, verbose=False
    )
    assert exported is not None
    session = runtime.InferenceSession(exported.model_proto.SerializeToString())
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), small(x).detach(), rtol=0, atol=1e-5)
