"""Batch-normalisation statistics: right averages, and nothing changed when it fails."""

from collections.abc import Callable

import pytest
import torch
from kiridashi_server.graph import GraphError, capture, reestimate_batch_norm, set_batch_norm_training
from torch import Tensor, nn

Make = Callable[[str], nn.Module]


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64) * (k + 1) for k in range(count)]


def test_they_equal_torch_s_own_cumulative_average(make_model: Make, images: Tensor) -> None:
    model = make_model("residual")
    program = capture(model, images)
    reference = model.train()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # torch's switch for a cumulative average
    with torch.no_grad():
        for batch in batches(3):
            reference(batch)
    refreshed = reestimate_batch_norm(program, iter(batches(3)))
    for name, buffer in refreshed.named_buffers():
        torch.testing.assert_close(buffer, reference.get_buffer(name), rtol=1e-12, atol=1e-12)


def test_the_program_is_left_alone_and_the_copy_normalises_by_running_statistics(
    make_model: Make, images: Tensor
) -> None:
    program = capture(make_model("residual"), images)
    before = {name: buffer.clone() for name, buffer in program.named_buffers()}
    refreshed = reestimate_batch_norm(program, batches(2))
    assert all(torch.equal(buffer, before[name]) for name, buffer in program.named_buffers())
    torch.testing.assert_close(refreshed(images)[:1], refreshed(images[:1]), rtol=0, atol=1e-12)
    assert not torch.allclose(refreshed(images), program(images))
    assert all(
        parameter.requires_grad == program.get_parameter(name).requires_grad
        for name, parameter in refreshed.named_parameters()
    )


def test_a_program_without_norms_is_simply_copied(make_model: Make, images: Tensor) -> None:
    program = capture(make_model("attention"), images)
    assert torch.equal(reestimate_batch_norm(program, batches(1))(images), program(images))


def test_no_batch_is_refused(make_model: Make, images: Tensor) -> None:
    with pytest.raises(GraphError, match="no batch was given"):
        reestimate_batch_norm(capture(make_model("residual"), images), [])


def test_a_batch_without_variance_is_refused(images: Tensor) -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3)).double().eval()
    with pytest.raises(GraphError, match="no variance"):
        reestimate_batch_norm(capture(model, images), [images[:1]])


def test_training_mode_can_be_switched_on_and_off(make_model: Make, images: Tensor) -> None:
    program = capture(make_model("residual"), images)
    evaluated = program(images)
    set_batch_norm_training(program, True)
    trained = program(images)
    assert not torch.allclose(trained, evaluated)
    set_batch_norm_training(program, False)
    assert not torch.allclose(program(images), trained)
    assert not torch.allclose(program(images), evaluated)  # the running statistics moved while it was on
