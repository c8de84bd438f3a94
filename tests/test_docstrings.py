"""Every public name says what it takes and gives: parameters, shapes, dtypes, errors and, if published, the source.

The checks are about what a reader needs, not about form: a parameter is named somewhere in the text, a tensor has a
shape and a dtype, an error that the code raises is named, an equation has its paper.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.errors import ConfigError, ShapeError

PARTS = [name for name in ("functional", "adalora", "moe") if importlib.util.find_spec(f"fastlora.{name}")]
SHAPE = re.compile(r"\[[^\]\d][^\]]*\]|\[\d+\]|0-dim|any shape|`\w*\.?shape`|a shape|in_features|out_features")
DTYPE = re.compile(
    r"\b(fp16|bf16|fp32|fp64|float16|bfloat16|float32|float64|float|floating-point|uint8|int64|bool|dtype)"
)
PAPER = re.compile(r"\b\d{4}\.\d{4,5}\b|Philox")

# What computes a published method, and so has a source.
PUBLISHED = {
    *("LoraConfig", "LoraLinear", "QLoraLinear", "QuantizedWeight", "param_groups"),
    *("functional.lora_linear", "functional.qlora_linear", "functional.quantize", "functional.dequantize"),
    *("functional.dora_weight_norm", "functional.dropout_mask"),
    *("adalora.AdaLoraConfig", "adalora.RankAllocator", "adalora.orthogonal_penalty"),
    *("moe.MixLoraConfig", "moe.LoraMoeConfig", "moe.MolaConfig"),
    *("moe.MixLoraMLP", "moe.LoraMoeLinear", "moe.MolaLinear", "moe.router_loss"),
}


def top() -> dict[str, Any]:
    """The public names: of the package and of its public modules."""
    found = {name: getattr(fastlora, name) for name in fastlora.__all__}
    for part in PARTS:
        module = importlib.import_module(f"fastlora.{part}")
        found |= {f"{part}.{name}": getattr(module, name) for name in module.__all__}
    return found


def methods(kind: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public methods that fastlora itself defines, inherited ones included."""
    seen = set()
    for base in kind.__mro__:
        if not base.__module__.startswith("fastlora"):
            continue
        for name, value in vars(base).items():
            plain = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
            if not name.startswith("_") and inspect.isfunction(plain) and name not in seen:
                seen.add(name)
                yield name, plain


def callables() -> dict[str, Callable[..., Any]]:
    """Everything public that is called; a method under the class that defines it, once."""
    found: dict[str, Callable[..., Any]] = {}
    for name, thing in top().items():
        if inspect.isclass(thing):
            found[name] = thing
            found |= {f"{method.__qualname__}": method for _, method in methods(thing)}
        elif inspect.isfunction(thing):
            found[name] = thing
    return found


def text_of(thing: Any) -> str:
    """Its own docstring, not an inherited one; where it says "as `name`" or "those of `name`", that one's as well."""
    text = inspect.cleandoc(thing.__doc__ or "")
    for name in re.findall(r"\b(?:as|those of) `(\w+)`", text):
        text += "\n" + "\n".join(
            inspect.cleandoc(other.__doc__ or "") for other in KNOWN.get(name, ()) if other is not thing
        )
    return text


CALLABLES = callables()
KNOWN: dict[str, list[Any]] = {}
for _name, _thing in CALLABLES.items():
    KNOWN.setdefault(_name.rpartition(".")[2], []).append(_thing)
    for _base in _thing.__mro__[1:] if inspect.isclass(_thing) else ():
        KNOWN.setdefault(_base.__name__, []).append(_base)


# --- the checks -------------------------------------------------------------------------------------------------------


def unnamed_parameters(thing: Callable[..., Any]) -> list[str]:
    """Parameters that the docstring never names."""
    if inspect.isclass(thing) and issubclass(thing, BaseException):
        return []
    if inspect.isclass(thing) and re.search(r"Made by `\w+`", text_of(thing)):
        return []  # the constructor is not the way: the method named there is checked itself
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(thing).parameters.values()
    names = [each.name for each in parameters if each.kind not in kinds and each.name not in ("self", "cls")]
    text = text_of(thing)
    return [name for name in names if not re.search(rf"\b{re.escape(name)}\b", text)]


def tensors_without(thing: Callable[..., Any]) -> list[str]:
    """What is missing about the tensors it takes or gives: "shape", "dtype"."""
    if inspect.isclass(thing) or only_raises(thing):
        return []
    hints = [str(hint) for hint in inspect.get_annotations(thing).values()]
    plain = [re.sub(r"(dict|Mapping|Callable)\[.*\]", "", hint) for hint in hints]
    if not any(re.search(r"\bTensor\b", hint) for hint in plain):
        return []
    text = text_of(thing)
    return [what for what, pattern in (("shape", SHAPE), ("dtype", DTYPE)) if not pattern.search(text)]


def only_raises(function: Callable[..., Any]) -> bool:
    """Whether a function does nothing but refuse."""
    return all(isinstance(part, (ast.Raise, ast.Expr)) for part in _tree(function).body[0].body)  # type: ignore[attr-defined]


def lost_lines(thing: Any) -> list[str]:
    """Lines of a section that belong to no entry of it: the reference would drop them."""
    found = []
    for name, section in re.findall(r"^(Args|Attributes|Raises):\n((?:[ ]+.*\n?|\n)+)", text_of(thing), re.MULTILINE):
        lines = textwrap.dedent(section).splitlines()
        found += [f"{name}: {line}" for line in lines if line[:1].strip() and not re.match(r"[\w, ]+: ", line)]
    return found


def raised(thing: Callable[..., Any]) -> set[str]:
    """Names of the exceptions it raises itself, or a function or method of the same module that it calls."""
    body = getattr(thing, "__post_init__", thing.__init__) if inspect.isclass(thing) else thing
    if not inspect.isfunction(body):
        return set()
    module, owner = inspect.getmodule(body), body.__qualname__.rpartition(".")[0]
    found = _raised_in(body)
    for node in ast.walk(_tree(body)):
        if not isinstance(node, ast.Call):
            continue
        called: Any = None
        if isinstance(node.func, ast.Name):
            called = getattr(module, node.func.id, None)
        elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            kind = getattr(module, owner, None)
            if node.func.value.id == "self" and kind is not None and node.func.attr.startswith("_"):
                called = inspect.getattr_static(kind, node.func.attr, None)
        if inspect.isfunction(called) and called.__module__ == module.__name__:
            found |= _raised_in(called)
    return found


@functools.cache
def _tree(function: Callable[..., Any]) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def _raised_in(function: Callable[..., Any]) -> set[str]:
    found = set()
    for node in ast.walk(_tree(function)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            found.add(node.exc.func.id)
    return found - {"AssertionError", "NotImplementedError"}


def unsaid_errors(thing: Callable[..., Any]) -> set[str]:
    """Exceptions that it raises and its docstring does not name under "Raises:"."""
    if inspect.isclass(thing) and issubclass(thing, BaseException):
        return set()
    _, _, said = text_of(thing).partition("Raises:")
    return {name for name in raised(thing) if not re.search(rf"\b{name}\b", said)}


@pytest.mark.parametrize("name", CALLABLES)
def test_parameters_are_named(name):
    assert unnamed_parameters(CALLABLES[name]) == []


@pytest.mark.parametrize("name", CALLABLES)
def test_tensors_have_shape_and_dtype(name):
    assert tensors_without(CALLABLES[name]) == []


@pytest.mark.parametrize("name", CALLABLES)
def test_errors_are_said(name):
    assert unsaid_errors(CALLABLES[name]) == set()


@pytest.mark.parametrize("name", CALLABLES)
def test_no_line_of_a_section_is_lost(name):
    assert lost_lines(CALLABLES[name]) == []


@pytest.mark.parametrize("name", sorted(PUBLISHED & set(top())))
def test_published_methods_name_their_source(name):
    assert PAPER.search(text_of(top()[name]))


def test_what_computes_has_a_source():
    """A public function that makes a tensor of tensors, or a layer, belongs among those with a source."""
    for name, thing in top().items():
        is_layer = inspect.isclass(thing) and issubclass(thing, nn.Module)
        hints = {key: str(hint) for key, hint in inspect.get_annotations(thing).items()} if not is_layer else {}
        makes = name.startswith("functional.") and "Tensor" in hints.get("return", "")
        assert not (is_layer or makes) or name in PUBLISHED, f"{name} needs its source"


def test_every_module_says_what_it_is():
    for part in PARTS:
        assert inspect.getdoc(importlib.import_module(f"fastlora.{part}"))


# --- the checks can fail ----------------------------------------------------------------------------------------------


def _helper(x: Tensor) -> None:
    if x.dim() > 1:
        raise ShapeError("no")


def bare(x: Tensor, rate: float) -> Tensor:
    """Scale x."""
    if rate < 0:
        raise ConfigError("no")
    _helper(x)
    return x * rate


def torn(x: Tensor) -> None:
    """Look at x.

    Raises:
        ShapeError: it is
        too long.
    """


def good(x: Tensor, rate: float) -> Tensor:
    """Scale x [n], fp32, by rate.

    Raises:
        ConfigError: a negative rate. ShapeError: more than one dimension.
    """
    return bare(x, rate)


def test_a_bare_docstring_is_noticed():
    assert unnamed_parameters(bare) == ["rate"]
    assert tensors_without(bare) == ["shape", "dtype"]
    assert unsaid_errors(bare) == {"ConfigError", "ShapeError"}
    assert (unnamed_parameters(good), tensors_without(good), unsaid_errors(good)) == ([], [], set())
    assert good(torch.ones(2), 2.0).tolist() == [2.0, 2.0]
    assert not PAPER.search(text_of(good))
    assert (lost_lines(torn), lost_lines(good)) == (["Raises: too long."], [])
