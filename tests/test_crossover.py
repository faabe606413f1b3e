"""From where on sparse prefill pays: measured tables, and what is done where nothing was measured."""

import json
from types import SimpleNamespace

import pytest
import torch

import keysift
from keysift.ops import crossover
from keysift.ops.crossover import dense_below, save, shape_name, user_table
from tests.helpers import structured_qkv

SHIPPED = {"GPU A": {"32/8x128": 4096, "8/2x128": 9000}, "GPU B": {"32/8x128": 20_000}}


@pytest.fixture(autouse=True)
def _tables(monkeypatch, tmp_path):
    """A shipped table and none of the user's; the device calls itself GPU A."""
    (tmp_path / "shipped.json").write_text(json.dumps(SHIPPED))
    monkeypatch.setattr(crossover, "SHIPPED", tmp_path / "shipped.json")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    device_is(monkeypatch, "GPU A")
    crossover._table.cache_clear()
    yield
    crossover._table.cache_clear()


def device_is(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)


def below(heads=32, kv_heads=8, dim=128, batch=1, is_cuda=True):
    q, k = (SimpleNamespace(shape=(batch, 100, h, dim), is_cuda=is_cuda, device="cuda:0") for h in (heads, kv_heads))
    return dense_below(q, k)


def test_the_shipped_table_can_be_read():
    shipped = json.loads((crossover.Path(crossover.__file__).with_name("crossover.json")).read_text(encoding="utf-8"))
    for shapes in shipped.values():
        for name, tokens in shapes.items():
            heads, rest = name.split("/")
            assert name == shape_name(int(heads), *map(int, rest.split("x"))) and tokens >= 0


def test_a_cpu_takes_every_prompt_sparsely():
    assert below(is_cuda=False) == 0
    q, k, _ = structured_qkv(40)
    assert dense_below(q, k) == 0


def test_a_measured_shape_counts_as_measured_and_another_as_the_nearest():
    assert below() == 4096
    assert below(8, 2) == 9000
    assert below(2, 2, batch=4) == 9000  # sequences count as heads
    assert below(28, 4) == 4096
    assert below(4, 4, 64) == 9000


def test_a_device_that_nobody_measured_gets_the_most_careful_guess(monkeypatch):
    device_is(monkeypatch, "GPU C")
    assert below() == 20_000
    crossover.SHIPPED.write_text("{}")
    crossover._table.cache_clear()
    assert below() == 0


def test_what_a_user_measured_comes_first_and_at_once(monkeypatch):
    assert below() == 4096
    path = save("GPU A", shape_name(32, 8, 128), 3000)
    assert path == user_table() and path.is_file()
    assert below() == 3000
    assert below(8, 2) == 9000
    save("GPU C", shape_name(32, 8, 128), 1)
    assert below() == 3000
    device_is(monkeypatch, "GPU C")
    assert below() == 1


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"GPU A": {"32/8x128"'])
def test_a_table_that_cannot_be_read_is_none(content):
    user_table().parent.mkdir(parents=True)
    user_table().write_bytes(content)
    assert below() == 4096
    save("GPU A", shape_name(32, 8, 128), 7)
    assert below() == 7


def test_the_users_table_lies_in_the_cache_folder(monkeypatch, tmp_path):
    assert user_table() == tmp_path / "cache" / "keysift" / "crossover.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_table() == tmp_path / ".cache" / "keysift" / "crossover.json"


def test_flexprefill_is_dense_below(monkeypatch):
    q, k, v = structured_qkv(400)
    density = []
    for known, tokens in ((401, 400), (400, 400), (250, 100), (270, 100)):  # the last 100 queries make 70,000 pairs
        monkeypatch.setattr("keysift.methods.flexprefill.dense_below", lambda q, k, known=known: known)
        _, stats = keysift.prefill_attention(q[:, -tokens:], k, v, "flexprefill:gamma=.7,block=16", return_stats=True)
        density.append(stats.density)
    assert density[0] == density[3] == 1 and density[1] < 1 and density[2] < 1
    _, stats = keysift.prefill_attention(q, k, v, "flexprefill:gamma=.7,block=16,dense_below=500", return_stats=True)
    assert stats.density == 1
    _, stats = keysift.prefill_attention(
        q[:, -100:], k, v, "flexprefill:gamma=.7,block=16,dense_below=0", return_stats=True
    )
    assert stats.density < 1
