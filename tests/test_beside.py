"""Layers that read the same input, computed as one product where code is compiled."""

import pytest
import torch
from torch import nn

from keysift.hf.beside import GROUPS, join_layers, part_layers
from tests.tiny_models import MODELS, tiny


@pytest.fixture(autouse=True)
def _others_get_models_of_their_own():
    yield
    tiny.cache_clear()
    torch._dynamo.reset()


def products(graph):
    return sum(node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) for node in graph.nodes)


def counting(counts):
    def backend(graph, inputs):
        from torch._functorch.aot_autograd import aot_module_simplified

        def inner(graph, _):
            counts.append(products(graph.graph))
            return graph

        return aot_module_simplified(graph, inputs, fw_compiler=inner)

    return backend


@pytest.mark.parametrize("name", MODELS)
def test_joined_layers_compute_what_each_does(name):
    model = tiny(name)
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        before = {key: x.clone() for key, x in model.state_dict().items()}
        join_layers(model)
        assert torch.equal(model(ids, use_cache=False).logits, expected)
        counts = []
        for layer in model.base_model.layers:
            layer.compile(fullgraph=True, backend=counting(counts))
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
        for layer in model.base_model.layers:
            layer._compiled_call_impl = None
        part_layers(model)
        assert torch.equal(model(ids, use_cache=False).logits, expected)
    assert {key: x.shape for key, x in model.state_dict().items()} == {key: x.shape for key, x in before.items()}
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    assert not any("Part" in type(module).__name__ for module in model.modules())
    if name.startswith(("llama", "qwen", "mistral")):  # q, k and v; o; gate and up; down
        assert counts and set(counts) == {4}


def test_layers_that_are_not_alike_stay_apart():
    block = nn.Module()
    block.q_proj, block.k_proj, block.v_proj = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4, bias=False)
    block.gate_proj, block.up_proj = nn.Linear(8, 4), nn.Linear(8, 4)
    block.up_proj.register_forward_hook(lambda *_: None)
    join_layers(block)
    assert {type(getattr(block, name)) for names in GROUPS for name in names} == {nn.Linear}
