"""The teacher follows the student's parameters and nothing else."""

import pytest
import torch
from torch import nn

from dinov3.errors import ConfigError
from dinov3.train.ema import ema_update


class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.register_buffer("constant", torch.randn(2))


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.992, 1.0])
def test_parameters_are_averaged_and_buffers_left_alone(momentum):
    teacher, student = Net(0), Net(1)
    before, of_student = snapshot(teacher), snapshot(student)
    ema_update(teacher, student, momentum)
    for name, value in teacher.state_dict().items():
        weight = 1.0 if name == "constant" else momentum
        expected = weight * before[name] + (1 - weight) * of_student[name]
        torch.testing.assert_close(value, expected)
    assert all(torch.equal(value, of_student[n]) for n, value in student.state_dict().items())


def test_the_ends_are_exact():
    teacher, student = Net(0), Net(1)
    before = snapshot(teacher)
    ema_update(teacher, student, 1.0)
    assert torch.equal(teacher.linear.weight, before["linear.weight"])
    ema_update(teacher, student, 0.0)
    assert torch.equal(teacher.linear.weight, student.linear.weight)


def test_no_graph_grows_and_storage_is_kept():
    teacher, student = Net(0), Net(1)
    address = teacher.linear.weight.data_ptr()
    ema_update(teacher, student, 0.9)
    assert teacher.linear.weight.data_ptr() == address
    assert teacher.linear.weight.grad_fn is None


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_an_impossible_momentum_is_refused(momentum):
    with pytest.raises(ConfigError, match=r"momentum: must lie in \[0, 1\]"):
        ema_update(Net(0), Net(1), momentum)


def test_different_modules_are_refused():
    with pytest.raises(ConfigError, match="teacher: must have the student's parameters, got bias"):
        ema_update(nn.Linear(3, 4), nn.Linear(3, 4, bias=False), 0.9)
