# SPDX-License-Identifier: Apache-2.0
"""A short hash of everything that a compiled kernel comes from, so that rows of the table can be told to be stale.

It covers the kernel and every Triton function that it calls, without comments and docstrings, the constants that they
read, and what the kernel is compiled with. It does not cover Triton and its assembler: a row has their version.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import io
import json
import sys
import textwrap
import tokenize
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_ext.kernels.gpu.shipped import Shipped

#: Characters of a hash: two kernels of the table share one by chance less than once in a hundred million times.
LENGTH = 12

#: Modules whose functions belong to a kernel; those of others, Triton's own above all, go with its version.
OWN = "vllm_ext.kernels."

#: A constant that comes from this has one value for each Triton, so the expressions that make it are hashed instead.
VERSION = "triton.__version__"

#: Tokens that say nothing.
SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING)


def hash_kernel(shipped: Shipped) -> str:
    """The hash of a kernel as it is compiled, the same with every Triton and every Python."""
    compiled = [shipped.signature, shipped.constants, shipped.divisible, shipped.num_warps]
    text = json.dumps([dict(sorted(_collect(shipped.kernel).items())), compiled], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


@functools.cache
def _collect(kernel: Any) -> dict[str, str]:
    """{qualified name: text} of a Triton function and all that it reads."""
    found: dict[str, str] = {}
    open_functions = [kernel.fn]
    while open_functions:
        function = open_functions.pop()
        name = f"{function.__module__}.{function.__qualname__}"
        if name in found:
            continue
        source = textwrap.dedent(inspect.getsource(function))
        found[name] = normalize(source)
        for used, value in _list_globals(function, source):
            if isinstance(value, types.FunctionType):
                open_functions.append(value)
            else:
                found[f"{function.__module__}.{used}"] = value
    return found


def _list_globals(function: Callable[..., Any], source: str) -> Iterator[tuple[str, Any]]:
    """(name, own Triton function or text of a constant) of what a function reads of its module."""
    module = inspect.getmodule(function)
    assert module is not None
    names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    for name in sorted(names & vars(module).keys()):
        value = vars(module)[name]
        inner = getattr(value, "fn", None)
        if isinstance(inner, types.FunctionType):
            if inner.__module__.startswith(OWN):
                yield name, inner
        elif not isinstance(value, types.ModuleType | types.FunctionType | type):
            made = "; ".join(_trace(module, name))
            yield name, made if VERSION in made else repr(value)


def _trace(module: types.ModuleType, name: str) -> list[str]:
    """The expression of a constant, and of those that it is made of, wherever they were imported from."""
    expressions, imports = _read_module(module)
    if name in imports:
        origin, name = imports[name]
        return _trace(sys.modules[origin], name) if origin.startswith(OWN) else []
    if name not in expressions:
        return []
    parts = {node.id for node in ast.walk(ast.parse(expressions[name], mode="eval")) if isinstance(node, ast.Name)}
    return [expressions[name], *(text for part in sorted(parts - {name}) for text in _trace(module, part))]


@functools.cache
def _read_module(module: types.ModuleType) -> tuple[dict[str, str], dict[str, tuple[str, str]]]:
    """({name: expression} of a module's constants, {name: (module, name there)} of what it imports by name)."""
    source = inspect.getsource(module)
    expressions: dict[str, str] = {}
    imports: dict[str, tuple[str, str]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            text = ast.get_source_segment(source, node.value) or ""
            expressions.update({target.id: text for target in node.targets if isinstance(target, ast.Name)})
        elif isinstance(node, ast.ImportFrom):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), module.__package__)
            imports.update({alias.asname or alias.name: (origin, alias.name) for alias in node.names})
    return expressions, imports


def normalize(source: str) -> str:
    """Python without comments, docstrings and the way its lines are broken."""
    tokens = [one for one in tokenize.generate_tokens(io.StringIO(source).readline) if one.type not in SILENT]
    breaks = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    kept = []
    place = 0
    while place < len(tokens):
        token = tokens[place]
        ends_line = place + 1 < len(tokens) and tokens[place + 1].type == tokenize.NEWLINE
        if token.type == tokenize.STRING and ends_line and (place == 0 or tokens[place - 1].type in breaks):
            place += 2
            continue
        # A comma before a bracket is there because the formatter broke the line.
        if token.string != "," or tokens[place + 1].string not in ")]}":
            kept.append(tokenize.tok_name[token.type] if token.type in breaks else token.string)
        place += 1
    return " ".join(kept)
