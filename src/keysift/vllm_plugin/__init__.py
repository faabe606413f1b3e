"""keysift's methods inside vLLM: ``vllm serve --attention-backend CUSTOM --additional-config '{"keysift": ...}'``.

vLLM loads this room by its entry point, ``vllm.general_plugins``, in every process. Nothing of vLLM is imported before.
"""

from __future__ import annotations

import functools
import logging
import sys
from pathlib import Path
from typing import Any

from keysift.vllm_plugin import versions
from keysift.vllm_plugin.options import check

BACKEND = "keysift.vllm_plugin.backend.Backend"
log = logging.getLogger("vllm.keysift")  # where vLLM's own lines go


def register() -> None:
    """What vLLM calls when it starts; again in the same process it changes nothing."""
    if reason := versions.unsupported():
        log.warning("keysift: %s; --attention-backend CUSTOM will not work", reason)
        return
    vllm = versions.names()
    vllm.register_backend(vllm.BackendEnum.CUSTOM, BACKEND)
    platform = type(vllm.platform)
    if not getattr(platform, "_keysift", False):
        platform._keysift = True
        _check_configurations(platform, vllm.BackendEnum.CUSTOM)
        if vllm.platform.device_type == "cpu":
            _select_on_cpu(platform, vllm.BackendEnum.CUSTOM)
        from keysift.vllm_plugin.patch import use_prefill

        vllm.Worker.keysift_use_prefill = use_prefill


def _check_configurations(platform: Any, custom: Any) -> None:
    """Have every configuration checked when it is made, which is before any process starts."""
    original = platform.check_and_update_config.__func__

    @functools.wraps(original)
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        original(cls, vllm_config)
        if vllm_config.model_config is None:
            return
        try:
            check(vllm_config, vllm_config.attention_config.backend == custom)
        except ValueError as error:
            if Path(sys.argv[0]).name == "vllm":  # its command line would bury the line under a traceback
                raise SystemExit(f"keysift: {error}") from None
            raise

    platform.check_and_update_config = classmethod(check_and_update_config)


def _select_on_cpu(platform: Any, custom: Any) -> None:
    """Have ``--attention-backend CUSTOM`` count on CPUs, where vLLM takes its own whatever is asked for."""
    original = platform.get_attn_backend_cls.__func__

    @functools.wraps(original)
    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, *args: Any, **more: Any
    ) -> str:
        if selected_backend != custom:
            return str(original(cls, selected_backend, attn_selector_config, *args, **more))
        for what in ("use_mla", "use_sparse", "use_mm_prefix"):
            if getattr(attn_selector_config, what, False):
                raise ValueError(f"keysift's attention does not serve this model: it has attention with {what}")
        return str(custom.get_path())

    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
