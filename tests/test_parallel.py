"""A model dealt out to two processes gives what it gives in one; here over gloo, on CPUs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from keysift import LLM, SamplingParams, pocket
from tests.devices import INTERPRETED
from tests.tiny_models import tiny

SPECS = ("dense", "quest:keep=0.3,page=4,window=8,dense_layers=none,dense_below=0", "snapkv:budget=30,window=8")
DRAWN = tuple(
    f"{spec},window=8,sinks=2,dense_layers=none,dense_below=0"
    for spec in ("signbits:keep=0.3", "magicpig:K=3,L=20", "oracle:keep=0.3", "verified:base=0.1,top=0.1")
)
DEALT = ("qwen2", "qwen3", "llama-linear-rope-mha", "gemma3", "gpt-neox", "phi3")
PROMPTS = [[5, 6, 7, 8, 9] * 10, [3, 4] * 30, [11] * 20, [50, 51, 52] * 12]
PROGRAM = """
import json, os, sys
from keysift import LLM, SamplingParams
found = {}
for path in sys.argv[2:]:
    for spec in SPECS[path]:
        with LLM(path, decode=spec, device="cpu", max_batch=3, max_length=128, page=16) as llm:
            out = llm.generate(PROMPTS, SamplingParams(max_new_tokens=12, temperature=0.5, seed=3))
            found[f"{path} {spec}"] = [llm.served.shapes[0].kv_heads, [x.token_ids for x in out]]
json.dump(found, open(f"{sys.argv[1]}.{os.environ['RANK']}", "w"))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of tiny models, with biases that are not zero and a vocabulary that two does not divide."""
    made = {}
    for name in (*DEALT, "glm-4-9b"):
        model = tiny(name)
        for key, x in model.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(x, std=0.2, generator=torch.Generator().manual_seed(len(made)))
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
        for file in pocket.path().glob("*token*"):
            shutil.copy(file, made[name])
    tiny.cache_clear()
    return made


@pytest.mark.slow
def test_two_processes_give_the_tokens_of_one(folders, tmp_path):
    paths = [str(folders[name]) for name in DEALT]
    program = tmp_path / "program.py"
    specs = {path: SPECS + DRAWN * ("qwen" in path) for path in paths}
    program.write_text(f"SPECS = {specs}\nPROMPTS = {PROMPTS}\n" + PROGRAM)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    done = subprocess.run([*start, str(tmp_path / "out"), *paths], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"out.{rank}").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    for path in paths:
        for spec in specs[path]:
            with LLM(path, decode=spec, device="cpu", max_batch=3, max_length=128, page=16) as llm:
                out = llm.generate(PROMPTS, SamplingParams(max_new_tokens=12, temperature=0.5, seed=3))
                kv_heads = llm.served.shapes[0].kv_heads
            local, tokens = ranks[0][f"{path} {spec}"]
            assert tokens == [x.token_ids for x in out], (path, spec)
            assert local == (kv_heads if "phi3" in path else kv_heads // 2)  # whose fused projections stay whole


@pytest.mark.slow
def test_a_draft_model_of_the_first_process_drafts_for_all(folders):
    path, params = str(folders["qwen2"]), SamplingParams(max_new_tokens=20)
    options = {"device": "cpu", "max_batch": 2, "max_length": 256, "page": 16}
    with LLM(path, **options) as llm:
        expected = [x.token_ids for x in llm.generate(PROMPTS, params)]
    how = {"draft_model": path, "draft": "streaming:budget=64", "gamma": 3}
    with LLM(path, tensor_parallel=2, **how, **options) as llm:
        found = llm.generate(PROMPTS, params)
    assert [x.token_ids for x in found] == expected
    assert sum(x.stats.accepted_per_round for x in found) > len(found)


@pytest.mark.slow
def test_processes_started_here_do_the_same_until_one_dies(folders):
    path, params = str(folders["qwen2"]), SamplingParams(max_new_tokens=12)
    with LLM(path, device="cpu", max_batch=2, max_length=1024) as llm:
        expected = [x.token_ids for x in llm.generate(PROMPTS, params)]
    llm = LLM(path, device="cpu", max_batch=2, max_length=1024, tensor_parallel=2)
    worker = llm._ranks._workers._processes[0]
    try:
        llm.switch(draft="quest:keep=0.3,page=4,window=8,dense_below=0")
        assert [x.token_ids for x in llm.generate(PROMPTS, params)] == expected
        llm.switch(draft="none")
        assert [x.token_ids for x in llm.generate(PROMPTS, params)] == expected
        with pytest.raises(KeyError, match="mine"):  # an error of the caller's is the caller's
            llm.generate(PROMPTS, params, on_text=lambda delta: {}["mine"])
        assert [x.token_ids for x in llm.generate(PROMPTS, params)] == expected
        seen = []

        def kill(delta):
            seen.append(delta)
            if len(seen) == 5:
                os.kill(worker.pid, signal.SIGKILL)

        begin = time.monotonic()
        with pytest.raises(RuntimeError, match="tensor-parallel rank 1 ended with code -9"):
            llm.generate(PROMPTS[0], SamplingParams(max_new_tokens=900), on_text=kill)
        assert time.monotonic() - begin < 30
    finally:
        llm.close()
    assert worker.poll() is not None


@pytest.mark.parametrize(
    ("model", "ranks", "message"),
    [
        ("qwen2", 3, "tensor_parallel=3: the model has 2 KV heads; choose 1, 2"),
        ("glm-4-9b", 2, "tensor_parallel=2: the model has 1 KV heads; choose 1"),
        ("qwen2", 0, "tensor_parallel=0: the model has 2 KV heads; choose 1, 2"),
    ],
)
def test_numbers_that_do_not_divide_the_kv_heads_are_refused(folders, model, ranks, message):
    with pytest.raises(ValueError, match=message):
        LLM(str(folders[model]), tensor_parallel=ranks, device="cpu")


def test_a_loaded_model_is_dealt_out_under_torchrun_alone():
    with pytest.raises(ValueError, match="tensor_parallel=2 of a loaded model: torchrun must start as many"):
        LLM(tiny("qwen2"), tensor_parallel=2)


# ---- sums into the other GPUs' memory -------------------------------------------------------------------------------


@pytest.mark.skipif(not INTERPRETED, reason="one process stands for all ranks, which needs Triton's interpreter")
@pytest.mark.parametrize("numbers", [2, 1026, 4096])
@pytest.mark.parametrize(("rank", "ranks"), [(0, 2), (1, 2), (1, 3), (2, 3)])
def test_each_rank_sends_its_numbers_and_adds_up_all(numbers, rank, ranks):
    from keysift.ops import sum_ranks_triton as kernels

    memory = [torch.zeros(kernels.buffer_words(ranks), dtype=torch.int64) for _ in range(ranks)]
    addresses = torch.tensor([x.data_ptr() for x in memory])
    calls = torch.zeros(kernels.CAPACITY // kernels.WORDS, dtype=torch.int32)
    random = torch.Generator().manual_seed(numbers)
    for call in range(1, 5):
        parts = [torch.randint(-40, 40, (numbers,), generator=random).bfloat16() for _ in range(ranks)]
        words = [(call << 32) | (x.view(torch.int32).long() & 0xFFFFFFFF) for x in parts]

        def place(r, half=(call & 1) * ranks):
            return slice((half + r) * kernels.CAPACITY, (half + r) * kernels.CAPACITY + numbers // 2)

        for other in set(range(ranks)) - {rank}:  # who have sent theirs already
            memory[rank][place(other)] = words[other]
        found = kernels.sum_ranks(parts[rank], memory[rank], addresses, calls, rank)
        assert torch.equal(found, torch.stack(parts).float().sum(0).bfloat16())
        for other in set(range(ranks)) - {rank}:
            assert torch.equal(memory[other][place(rank)], words[rank])
    assert calls[: -(-numbers // 2 // kernels.WORDS)].tolist() == [4] * -(-numbers // 2 // kernels.WORDS)
