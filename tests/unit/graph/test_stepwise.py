"""Programs run step by step compute what the code of their graph computes, and let go of what they have used."""

import copy
import inspect
import pickle
import weakref

import pytest
import torch
from kiridashi_server.graph.stepwise import Program
from torch import Tensor, fx, nn


def _graph() -> fx.Graph:
    """Two inputs; a weight, a list of results, an argument by name, a nested output."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    product = graph.call_function(torch.ops.aten.linear.default, (x, graph.get_attr("inner.weight")))
    joined = graph.call_function(torch.ops.aten.cat.default, ([product, y, product], 1))
    first, last = (
        graph.call_function(torch.ops.aten.slice.Tensor, (joined, 1, *ends)) for ends in ((0, 2), (-2, 1_000))
    )
    rounded = graph.call_function(torch.ops.aten.round.decimals, (first,), {"decimals": 2})
    graph.output((rounded, (last, joined)))
    return graph


def _root() -> nn.Module:
    root = nn.Module()
    root.add_module("inner", nn.Linear(3, 4, bias=False))
    return root


def _inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, generator=generator), torch.randn(2, 5, generator=generator)


def _assert_same(one: fx.GraphModule, other: fx.GraphModule) -> None:
    first, (last, joined) = one(*_inputs())
    wanted, (also, whole) = other(*_inputs())
    assert torch.equal(first, wanted)
    assert torch.equal(last, also)
    assert torch.equal(joined, whole)


def test_steps_compute_what_the_code_computes() -> None:
    root = _root()
    program, module = Program(root, _graph()), fx.GraphModule(root, _graph())
    _assert_same(program, module)
    assert program.code == module.code


def test_exporters_see_what_they_see_of_code() -> None:
    root = _root()
    stepwise, coded = (
        torch.export.export(kind(root, _graph()), _inputs(), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) * 2)
        for kind in (Program, fx.GraphModule)
    )
    assert stepwise.graph_module.code == coded.graph_module.code
    assert stepwise.graph_signature == coded.graph_signature


def test_parameters_are_read_at_every_call() -> None:
    program = Program(_root(), _graph())
    before = program(*_inputs())[0]
    program.get_submodule("inner").weight = nn.Parameter(torch.zeros(4, 3))
    assert not torch.equal(program(*_inputs())[0], before)
    assert not program(*_inputs())[0].any()


def test_inputs_go_by_place_or_by_name() -> None:
    program = Program(_root(), _graph())
    x, y = _inputs()
    assert list(inspect.signature(program.forward).parameters) == ["x", "y"]
    assert torch.equal(program(x, y=y)[0], program(x, y)[0])
    assert torch.equal(program(y=y, x=x)[0], program(x, y)[0])
    with pytest.raises(TypeError, match="y"):
        program(x)
    with pytest.raises(TypeError):
        program(x, y, x)


def test_copies_run_by_themselves() -> None:
    program = Program(_root(), _graph())
    copied = copy.deepcopy(program)
    _assert_same(copied, program)
    _assert_same(pickle.loads(pickle.dumps(program)), program)
    with torch.no_grad():
        copied.get_submodule("inner").weight.zero_()
    assert not copied(*_inputs())[0].any()
    assert program(*_inputs())[0].any()


def test_an_edit_counts_after_recompile_and_for_this_program_alone() -> None:
    program, other = Program(_root(), _graph()), Program(_root(), _graph())
    wanted = other(*_inputs())[0]
    (rounded,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.round.decimals)
    rounded.replace_all_uses_with(program.graph.find_nodes(op="get_attr")[0])
    program.recompile()
    assert program(*_inputs())[0].shape == (4, 3)
    assert torch.equal(other(*_inputs())[0], wanted)


def test_results_are_let_go_after_their_last_use() -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[list[bool]] = []

    def step(value: Tensor, others: list[Tensor] | None = None) -> Tensor:
        alive.append([reference() is not None for reference in made])
        result = value + 1
        made.append(weakref.ref(result))
        return result

    graph = fx.Graph()
    first = graph.call_function(step, (graph.placeholder("x"),))
    second = graph.call_function(step, (first, [first]))
    third = graph.call_function(step, (second,))
    graph.output(graph.call_function(step, (third, [second])))
    Program(nn.Module(), graph)(torch.zeros(1))
    assert alive == [[], [True], [False, True], [False, True, True]]


def test_what_programs_have_not_is_refused() -> None:
    graph = fx.Graph()
    graph.output(graph.call_method("relu", (graph.placeholder("x"),)))
    with pytest.raises(NotImplementedError, match="call_method"):
        Program(nn.Module(), graph)
