# SPDX-License-Identifier: Apache-2.0
"""One text for a callable's signature, the same whether read from source or from a live object.

    async method(self, usage_context=, *, headless=)

It holds what a wrapper depends on: kind (async, static, class method, property), parameter names, kinds and
which have defaults. Annotations and default values are left out: vLLM edits them without changing how a
function is called.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class SymbolAbsentError(LookupError):
    """The module, class or function that a patch names does not exist in this vLLM."""


def compute_digest(signature: str) -> str:
    """First 12 hex digits of the SHA-256 of a signature text."""
    return hashlib.sha256(signature.encode()).hexdigest()[:12]


def split_target(target: str) -> tuple[str, list[str]]:
    """`vllm.a.b:Class.method` -> (`vllm.a.b`, [`Class`, `method`])."""
    module, _, qualified_name = target.partition(":")
    return module, qualified_name.split(".")


def read_live_signature(target: str) -> str:
    """Signature text of an imported symbol; a functools.wraps wrapper reads as the function it wraps.

    Raises SymbolAbsentError when the module cannot be imported, the name is not defined there itself (inherited
    members are not: their source is elsewhere), or what it names is not a function.
    """
    module, names = split_target(target)
    try:
        owner: Any = importlib.import_module(module)
        for name in names[:-1]:
            owner = getattr(owner, name)
        function = vars(owner)[names[-1]]
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        raise SymbolAbsentError(f"{target}: {type(error).__name__}: {error}") from error
    if isinstance(function, property | functools.cached_property):
        return "property"
    kind = "function"
    if isinstance(function, staticmethod | classmethod):
        kind = type(function).__name__
        function = function.__func__
    if not callable(function) or isinstance(function, type):
        raise SymbolAbsentError(f"{target}: {type(function).__name__} is not a function")
    function = inspect.unwrap(function)
    if inspect.iscoroutinefunction(function):
        kind = "async " + kind
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise SymbolAbsentError(f"{target}: {error}") from error
    return _write_signature(kind, ((p.name, p.kind, p.default is not p.empty) for p in parameters))


def read_source_signature(root: Path, target: str) -> str:
    """Signature text of a symbol in an unpacked vLLM, without importing it.

    `root` is the package directory (`.../site-packages/vllm`). Raises SymbolAbsentError.
    """
    module, names = split_target(target)
    relative = Path(*module.split(".")[1:])
    candidates = [root / relative.with_suffix(".py"), root / relative / "__init__.py"]
    source = next((path for path in candidates if path.is_file()), None)
    if source is None:
        raise SymbolAbsentError(f"{target}: no file for module {module}")
    body: list[ast.stmt] = ast.parse(source.read_text(encoding="utf-8")).body
    for name in names[:-1]:
        body = _find_definition(body, name, (ast.ClassDef,), target).body
    function = _find_definition(body, names[-1], (ast.FunctionDef, ast.AsyncFunctionDef), target)
    decorators = {ast.unparse(decorator) for decorator in function.decorator_list}
    if decorators & {"property", "cached_property", "functools.cached_property"}:
        return "property"
    kind = next((name for name in ("staticmethod", "classmethod") if name in decorators), "function")
    if isinstance(function, ast.AsyncFunctionDef):
        kind = "async " + kind
    return _write_signature(kind, _list_parameters(function.args))


def _find_definition(body: list[ast.stmt], name: str, types: tuple[type, ...], target: str) -> Any:
    """The last definition of `name` in a block, looking into `if`, `try` and `with` as a running module would."""
    found = None
    for statement in _flatten(body):
        # A property's setter and deleter repeat its name; the getter is what reading the property finds.
        if isinstance(statement, types) and getattr(statement, "name", None) == name and not _is_accessor(statement):
            found = statement
    if found is None:
        raise SymbolAbsentError(f"{target}: no definition of {name}")
    return found


def _flatten(body: list[ast.stmt]) -> Iterable[ast.stmt]:
    """Statements of a block in the order of the text, those inside compound statements included.

    Of `try`, the handlers come before the body, so that a fallback definition does not hide the regular one.
    """
    for statement in body:
        yield statement
        if isinstance(statement, ast.Try):
            for handler in statement.handlers:
                yield from _flatten(handler.body)
            yield from _flatten([*statement.body, *statement.orelse, *statement.finalbody])
        elif isinstance(statement, ast.If):
            yield from _flatten([*statement.orelse, *statement.body])
        elif isinstance(statement, ast.With):
            yield from _flatten(statement.body)


def _is_accessor(statement: Any) -> bool:
    return any(
        isinstance(decorator, ast.Attribute) and decorator.attr in ("setter", "deleter")
        for decorator in statement.decorator_list
    )


def _list_parameters(arguments: ast.arguments) -> Iterable[tuple[str, Any, bool]]:
    kinds = inspect.Parameter
    positional = [*arguments.posonlyargs, *arguments.args]
    first_default = len(positional) - len(arguments.defaults)
    for position, argument in enumerate(positional):
        only = position < len(arguments.posonlyargs)
        kind = kinds.POSITIONAL_ONLY if only else kinds.POSITIONAL_OR_KEYWORD
        yield argument.arg, kind, position >= first_default
    if arguments.vararg:
        yield arguments.vararg.arg, kinds.VAR_POSITIONAL, False
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield argument.arg, kinds.KEYWORD_ONLY, default is not None
    if arguments.kwarg:
        yield arguments.kwarg.arg, kinds.VAR_KEYWORD, False


def _write_signature(kind: str, parameters: Iterable[tuple[str, Any, bool]]) -> str:
    marks = {
        inspect.Parameter.POSITIONAL_ONLY: "{}/",
        inspect.Parameter.POSITIONAL_OR_KEYWORD: "{}",
        inspect.Parameter.VAR_POSITIONAL: "*{}",
        inspect.Parameter.KEYWORD_ONLY: "{}!",
        inspect.Parameter.VAR_KEYWORD: "**{}",
    }
    texts = [marks[kind_].format(name) + ("=" if has_default else "") for name, kind_, has_default in parameters]
    return f"{kind}({', '.join(texts)})"
