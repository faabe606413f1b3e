"""mode=seed gives what the published implementations compute."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import keysift
from keysift.methods import flexprefill
from keysift.ops.codes import collision_table, collisions, directions, hash_planes, hash_query
from keysift.ops.gather import gather_attention
from keysift.types import KV, Ctx, Law
from tests.helpers import codes_in_common, relative_error, structured_qkv

DATA = Path(__file__).parent / "data"


def load(path):
    arrays = np.load(path)
    case = json.loads(str(arrays["case"]))
    tensors = {n: torch.from_numpy(arrays[n]) for n in arrays if n != "case"}
    return case, {n: t.view(torch.bfloat16) if n.endswith("bf16") else t for n, t in tensors.items()}


@pytest.mark.parametrize("path", sorted(DATA.glob("flexprefill_*.npz")), ids=lambda p: p.stem)
def test_flexprefill_block_sets_equal_the_published_ones(path):
    case, data = load(path)
    method = flexprefill.Method(
        gamma=case["gamma"],
        tau=case["tau"],
        min_budget=case["min_budget"],
        max_budget=case["max_budget"],
        block=case["block"],
        mode="seed",
    )
    k = data["k_bf16"]
    kv = KV.of(k, k)
    plan = method.plan(data["q_bf16"], kv, Ctx(0, case["D"] ** -0.5, kv.length - 1))
    blocks = math.ceil(case["N"] / case["block"])
    active = method.mask(plan, range(blocks)).active(blocks)[0]
    assert torch.equal(active, data["active"])
    assert 0 < active.sum() < active.shape[0] * blocks * (blocks + 1) / 2


def test_flexprefill_seed_cases_cover_both_branches():
    branches = set()
    for path in DATA.glob("flexprefill_*.npz"):
        case, data = load(path)
        method = flexprefill.Method(tau=case["tau"], min_budget=1, block=case["block"], mode="seed")
        kv = KV.of(data["k_bf16"], data["k_bf16"])
        branches |= set(method.plan(data["q_bf16"], kv, Ctx(0, 1.0, kv.length)).query_aware.flatten().tolist())
    assert branches == {True, False}


@pytest.mark.parametrize("path", sorted(DATA.glob("magicpig_*.npz")), ids=lambda p: p.stem)
def test_magicpig_retrieves_and_estimates_what_the_published_code_does(path):
    case, data = load(path)
    q, k, v, mean, w = (data[f"{n}_bf16"] for n in ("q", "k", "v", "mean", "W"))
    hits = codes_in_common(q.unflatten(0, (len(k), -1)), k - mean, w, case["K"]).flatten(0, 1)
    assert torch.equal(hits >= 2, data["retrieved"])
    kv = KV.of(k.transpose(0, 1)[None], v.transpose(0, 1)[None])
    law = Law(mean[None, :, 0], collision_table(case["K"], case["L"], 1e-4))
    planes = torch.zeros(1, k.shape[0], -(-k.shape[1] // 128), w.shape[-1], 4, dtype=torch.int32)
    rows = directions(w if w.dim() == 3 else w[None], case["K"])
    hash_planes(planes, kv, mean[None, :, 0].float(), None, rows, kv.start, k.shape[1])
    selection = collisions(hash_query(q[None], rows, case["K"]), planes, kv, case["K"], law)
    assert torch.equal(selection.count[0], data["retrieved"].sum(-1))
    assert torch.equal(selection.rows[0][selection.in_use()[0]].long(), data["retrieved"].nonzero()[:, -1])
    part = gather_attention(q[None], kv, selection, q.shape[-1] ** -0.5)
    assert relative_error(part.out[0, 0], data["out_bf16"]) < 4e-3  # the published output is rounded to bf16


def test_seed_and_default_flexprefill_run_end_to_end_and_differ():
    q, k, v = structured_qkv(2000)
    densities = []
    for mode in ("seed", "default"):
        out, stats = keysift.flex_prefill_attention(
            q, k, v, gamma=0.9, tau=0, min_budget=None, block_size=64, mode=mode, return_stats=True, measure_mass=True
        )
        assert torch.isfinite(out).all()
        densities.append(stats.density)
    assert 0 < densities[0] < densities[1] < 1  # the seed's token count, divided by 128, asks for too few blocks


def test_seed_mode_refuses_what_its_authors_code_cannot():
    q, k, v = torch.randn(1, 100, 2, 16), torch.randn(1, 900, 2, 16), torch.randn(1, 900, 2, 16)
    with pytest.raises(ValueError, match="as many queries as keys"):
        keysift.flex_prefill_attention(q, k, v, min_budget=None, mode="seed")
