"""``keysift methods``, ``keysift info`` and the options of ``keysift`` itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest
import torch

import keysift
from keysift.cli import info
from keysift.methods import catalog, parse, roles

from .conftest import Result

Cli = Callable[..., Result]


def test_methods_lists_every_field_of_every_method(cli: Cli) -> None:
    result = cli("methods", "--json")
    listed = {method["name"]: method for method in json.loads(result.out)}
    assert list(listed) == list(catalog())
    for name, cls in catalog().items():
        assert listed[name]["roles"] == list(roles(cls))
        assert [f["name"] for f in listed[name]["fields"]] == [f.name for f in dataclasses.fields(cls)]
        assert listed[name]["paper"] == cls.paper
        assert all(f["doc"] for f in listed[name]["fields"])


def test_the_defaults_in_the_table_are_spelled_as_a_spec_takes_them(cli: Cli) -> None:
    for name, cls in catalog().items():
        lines = [line.split() for line in cli("methods", name).out.splitlines() if line.startswith("  ")]
        keys = {field.name for field in dataclasses.fields(cls)}
        shown = {words[0]: words[1] for words in lines if words and words[0] in keys}
        assert shown.keys() == keys
        spec = f"{name}:" + ",".join(f"{key}={value}" for key, value in shown.items())
        assert parse(spec, roles(cls)[0]) == cls()


def test_the_table_has_every_method_with_its_paper(cli: Cli) -> None:
    out = cli("methods").out
    for name, cls in catalog().items():
        assert f"\n{name} " in out
        assert cls.paper.removeprefix("arXiv:") in out


def test_a_method_alone_says_what_values_it_takes(cli: Cli) -> None:
    out = cli("methods", "flexprefill").out
    assert "above 0 and at most 1" in out
    assert "one of 16, 32, 64, 128" in out


def test_info_names_versions_cores_and_backends(cli: Cli) -> None:
    found = json.loads(cli("info", "--json").out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"]["cores"] >= 1
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert all(backend["reason"] for backend in found["backends"])
    usable = {backend["name"]: backend["usable"] for backend in found["backends"]}
    assert usable["PyTorch SDPA"] is True
    assert usable["CPU kernels"] is False
    table = cli("info").out
    assert all(name in table for name in usable)


@pytest.mark.parametrize(
    ("capability", "version", "reason"),
    [
        (None, None, "sees no CUDA GPU"),
        ((8, 0), "4.0.0", "needs compute capability 9.0, this GPU has 8.0"),
        ((9, 0), None, "flash-attn-4 is not installed: pip install 'keysift[hopper]'"),
    ],
)
def test_info_gives_the_first_reason_against_a_backend(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, version: str | None, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0 if capability is None else 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(info, "installed", lambda distribution: version)
    backend = info.flash_attention_4()
    assert not backend.usable
    assert reason in backend.reason


def test_info_calls_a_backend_usable_where_nothing_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(info, "installed", lambda distribution: "4.0.0")
    assert info.flash_attention_4() == info.Backend(
        "FlashAttention 4", "prefill attention on Hopper and newer", True, "flash-attn-4 4.0.0"
    )


def test_help_and_version_end_well(cli: Cli) -> None:
    assert "generate" in cli().out
    assert cli("--help") == cli("-h")
    assert "--prefill-chunk" in cli("generate", "--help").out
    version = cli("--version")
    assert version.code == 0
    assert version.out == f"{keysift.__version__}\n"
