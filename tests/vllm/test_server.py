"""``keysift serve`` as OpenAI's clients see it: answers, streams, clients that leave, and hundreds of them at once."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.vllm.answers import DIGITS, MODEL, ON_GPU, book, question, served

METHODS = {"prefill": "flexprefill:min_budget=128,block=64,dense_below=0", "decode": "quest:keep=0.1,dense_below=0"}
NAME, LONGEST = "keysift-pocket", 2048  # tokens
PROMPTS = 20
REQUESTS = 500
START_S, END_S = 240, 60
MOST_GROWTH = 64 << 20  # bytes; 500 requests that each left its prompt's keys behind would leave 2 GiB
TEMPLATE = "<|bos|>{{ messages[-1]['content'] }}"  # the pocket model was never taught to chat


class Server(NamedTuple):
    process: subprocess.Popen
    url: str

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return response.read().decode()

    def metric(self, name):
        found = re.findall(rf"^vllm:{name}(?:{{.*}})? ([0-9.e+]+)$", self.get("/metrics"), re.MULTILINE)
        assert found, f"no metric {name}"
        return sum(map(float, found))

    def wait_until_idle(self):
        """Nothing runs and nothing waits."""
        for _ in range(300):
            if self.metric("num_requests_running") == self.metric("num_requests_waiting") == 0:
                return
            time.sleep(0.1)
        pytest.fail("requests that nobody waits for are still being served")

    def family(self):
        import psutil

        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def memory(self):
        """Bytes that its processes hold."""
        return sum(process.memory_info().rss for process in self.family())


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for_health(server, log):
    for _ in range(START_S):
        if server.process.poll() is not None:
            break
        try:
            server.get("/health")
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
        else:
            return
    pytest.fail("the server did not start:\n" + log.read_text()[-5000:])


def wait_for_the_end(processes):
    """Of all of them; who reaps them is not our matter."""
    import psutil

    def ended(process):
        try:
            return process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    for _ in range(100):
        if all(map(ended, processes)):
            return
        time.sleep(0.1)
    pytest.fail(f"still there: {[process for process in processes if not ended(process)]}")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Started as a user starts it; ended by SIGTERM, whereupon it and all its processes end, without an error."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    (folder / "template.jinja").write_text(TEMPLATE)
    log = folder / "log.txt"
    methods = [word for role in METHODS for word in (f"--{role}", METHODS[role])]
    ours = [*methods, "--port", port, "--dtype", "float32", "--max-length", LONGEST]
    theirs = ["--enforce-eager", "--max-num-seqs", 64, "--num-gpu-blocks-override", 250]
    theirs += ["--chat-template", folder / "template.jinja"]
    theirs += [word for name, value in ON_GPU.items() for word in (f"--{name.replace('_', '-')}", value)]
    line = map(str, [Path(sys.executable).with_name("keysift"), "serve", "pocket", *ours, *theirs])
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    with log.open("w") as file:
        process = subprocess.Popen([*line], stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=folder)
    server = Server(process, f"http://127.0.0.1:{port}")
    try:
        wait_for_health(server, log)
        yield server
        family = server.family()
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=END_S)
        assert code == 0, log.read_text()[-5000:]
        assert len(family) > 1
        wait_for_the_end(family[1:])
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def asked():
    """Prompts and their right answers."""
    return [question(i, 5) for i in range(PROMPTS)]


@pytest.fixture(scope="module")
def offline(asked):
    """What the same methods say to them in vLLM's own engine."""
    import vllm

    with served(methods=METHODS, max_model_len=LONGEST) as llm:
        outputs = llm.generate([text for text, _ in asked], vllm.SamplingParams(temperature=0, max_tokens=DIGITS),
                               use_tqdm=False)  # fmt: skip
        return [output.outputs[0].text for output in outputs]


@pytest.fixture(scope="module")
def client(server):
    import openai

    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def complete(client, prompt, **options):
    return client.completions.create(model=NAME, prompt=prompt, **{"max_tokens": DIGITS, "temperature": 0} | options)


def test_the_model_has_its_name(client):
    assert [model.id for model in client.models.list()] == [NAME]


def test_completions_are_what_the_same_methods_say_offline(client, asked, offline):
    for (text, answer), wanted in zip(asked, offline, strict=True):
        choice = complete(client, text).choices[0]
        assert choice.text == wanted
        assert answer in wanted


def test_streams_have_the_text_of_whole_answers(client, asked, offline):
    for (text, _), wanted in zip(asked[:4], offline, strict=False):
        pieces = [event.choices[0].text for event in complete(client, text, stream=True)]
        assert len(pieces) > 2
        assert "".join(pieces) == wanted
    long = complete(client, book()[:3000], max_tokens=100)
    stream = complete(client, book()[:3000], max_tokens=100, stream=True)
    assert "".join(event.choices[0].text for event in stream) == long.choices[0].text


def test_chats_are_completions_of_what_the_template_writes(client, asked, offline):
    options = {"model": NAME, "max_tokens": DIGITS, "temperature": 0}
    for (text, _), wanted in zip(asked[:4], offline, strict=False):
        chat = client.chat.completions.create(messages=[{"role": "user", "content": text}], **options)
        assert chat.choices[0].message.content.strip() == wanted.strip()
        stream = client.chat.completions.create(messages=[{"role": "user", "content": text}], stream=True, **options)
        parts = [event.choices[0].delta.content or "" for event in stream if event.choices]
        assert "".join(parts) == chat.choices[0].message.content


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": "word " * 3 * LONGEST}, [str(LONGEST)]),
        ({"max_tokens": -1}, ["max_tokens"]),
        ({"temperature": -1}, ["temperature"]),
        ({"model": "nobody/nothing"}, ["nobody/nothing"]),
    ],
)
def test_a_bad_request_is_refused_and_the_next_one_answered(client, asked, offline, change, words):
    import openai

    good = {"model": NAME, "prompt": asked[0][0], "max_tokens": DIGITS, "temperature": 0}
    with pytest.raises(openai.APIStatusError) as refused:
        client.completions.create(**good | change)
    assert 400 <= refused.value.status_code < 500
    for word in words:
        assert word in str(refused.value)
    assert client.completions.create(**good).choices[0].text == offline[0]


def test_vllm_bench_serve_counts_every_request(server, tmp_path):
    line = [sys.executable, "-m", "keysift.vllm_plugin.launch", "bench", "serve", "--backend", "openai"]
    line += ["--base-url", server.url, "--model", NAME, "--tokenizer", MODEL, "--dataset-name", "random"]
    line += ["--random-input-len", "300", "--random-output-len", "8", "--num-prompts", "12", "--ignore-eos"]
    line += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["total_output_tokens"]) == (12, 96)


def test_clients_that_leave_in_mid_stream_leave_nothing_running(server, client, asked, offline):
    for number in range(8):
        stream = complete(client, asked[number][0], max_tokens=1000, stream=True, extra_body={"ignore_eos": True})
        for _, _ in zip(range(3), stream, strict=False):
            pass
        assert server.metric("num_requests_running") == 1
        stream.close()
        server.wait_until_idle()
    assert complete(client, asked[0][0]).choices[0].text == offline[0]


def test_requests_that_time_out_in_the_middle_of_their_prompts_leave_nothing_running(server, client, asked, offline):
    import openai

    impatient = client.with_options(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        complete(impatient, book()[5000:10000], max_tokens=600, extra_body={"ignore_eos": True})
    server.wait_until_idle()
    assert complete(client, asked[1][0]).choices[0].text == offline[1]


async def streams(url, prompts):
    """The streamed answers to all prompts, which are asked at once."""
    import openai

    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=300) as client:

        async def answer(prompt):
            stream = await client.completions.create(
                model=NAME, prompt=prompt, max_tokens=DIGITS, temperature=0, stream=True
            )
            return "".join([event.choices[0].text async for event in stream])

        return await asyncio.gather(*map(answer, prompts))


def test_500_streams_at_once_are_all_answered_rightly_and_memory_stays_as_it_is(server, asked, offline):
    def burst(count):
        numbers = [i % PROMPTS for i in range(count)]
        answers = asyncio.run(streams(server.url, [asked[i][0] for i in numbers]))
        assert answers == [offline[i] for i in numbers]
        server.wait_until_idle()
        return server.memory()

    warm = burst(REQUESTS // 2)  # every page of the cache has been written once
    assert burst(REQUESTS) - warm < MOST_GROWTH
