"""One file, one paper. ``parse`` turns ``name:key=value,...`` into a method; the name is the file's name."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import types
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

Role = Literal["prefill", "decode"]


@functools.cache
def catalog() -> dict[str, type]:
    """Every method's class by name, sorted. A module of this package with a class ``Method`` is a method."""
    modules = {m.name: importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)}
    return {name: module.Method for name, module in sorted(modules.items()) if hasattr(module, "Method")}


def roles(cls: type) -> tuple[Role, ...]:
    """What a method can serve as."""
    has: tuple[tuple[Role, str], ...] = (("prefill", "mask"), ("decode", "select"))
    return tuple(role for role, attribute in has if hasattr(cls, attribute))


def parse(spec: Any, role: Role) -> Any:
    """The method that a SPEC names, for a role.

    Args:
        spec: ``name[:key=value[,key=value...]]``, or a method object, which is passed through.
        role: "prefill" or "decode".

    Raises:
        ValueError: unknown name, key or value, or a method that cannot serve in this role; says what there is.
    """
    able = {name: cls for name, cls in catalog().items() if role in roles(cls)}
    if not isinstance(spec, str):
        if type(spec) not in able.values():
            raise ValueError(f"{role}={spec!r}: pass a SPEC string or a method that can {role}: {', '.join(able)}")
        return spec
    name, _, rest = spec.partition(":")
    name = name.strip()
    if name not in able:
        known = "cannot serve here" if name in catalog() else "unknown"
        raise ValueError(f"{role} method '{name}' {known}: choose {', '.join(able)}")
    cls, options = able[name], {}
    hints = get_type_hints(cls)
    keys = [f.name for f in fields(cls)]
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in keys:
            raise ValueError(f"{name} has no option '{key}': {'choose ' + ', '.join(keys) if keys else 'it has none'}")
        if not equals or key in options:
            raise ValueError(f"'{item}' in '{spec}': write {key}=VALUE, once")
        options[key] = _value(name, key, value, hints[key])
    try:
        return cls(**options)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def describe(method: Any) -> str:
    """The SPEC of a method, with the options that differ from their defaults."""
    name = next(n for n, cls in catalog().items() if cls is type(method))
    changed = {f.name: getattr(method, f.name) for f in fields(method) if getattr(method, f.name) != f.default}
    shown = (f"{k}={'+'.join(map(str, v)) or 'none' if isinstance(v, tuple) else v}" for k, v in changed.items())
    return f"{name}:{','.join(shown)}" if changed else name


def _value(name: str, key: str, text: str, hint: Any) -> Any:
    """``text`` as a value of the field's type."""
    optional = get_origin(hint) is types.UnionType
    if text.lower() == "none" and optional:
        return None
    kind = next(a for a in get_args(hint) if a is not types.NoneType) if optional else hint
    try:
        if get_origin(kind) is tuple:
            return () if text.lower() == "none" else tuple(int(part) for part in text.split("+"))
        return kind(text)
    except ValueError:
        wanted = "layer numbers joined by +" if get_origin(kind) is tuple else f"of type {kind.__name__}"
        raise ValueError(f"{name}: {key}={text}: must be {wanted}") from None
