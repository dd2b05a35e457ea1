"""A jinja2 environment for chat templates that nobody has vouched for. In-process, and bounded.

jinja2's immutable sandbox keeps a template from reaching Python's internals and from changing its
inputs. It does not keep it from running for ever or filling the memory. Here every operation of a template
first reports to a meter:

    what the template does                               what bounds it
    loop iteration, macro call, comparison, call, filter  one tick each: CPU time is checked
    `+ * ** %`, `~`, replace, join, pad, format, indent   size of the result, computed before it is made
    list, tuple and dict literals, results of calls       weight: elements as if nothing were shared, so that
                                                          `[x, x]` forty times over is a trillion, not eighty
    text that is output, also inside `set` blocks         characters, summed over the whole render
    attributes and methods                                a list of allowed ones; the rest is undefined
    filters                                               a list; the slow ones only on small values

One operation between two ticks works on values that passed these limits, so it is short. Deep recursion
ends in Python's own limit. What remains outside is the size of the inputs, which the caller bounds.
"""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable, Collection, ItemsView, Iterator, KeysView, ValuesView
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any, Final, NamedTuple

from jinja2 import TemplateRuntimeError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, TemplateReference
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

_BIG_INTEGER_BITS: Final = 4096
_FORMAT_WIDTH_MAX: Final = 1000
_SLOW_FILTER_WEIGHT: Final = 65_536
_SIZE_ARGUMENT_MAX: Final = 10_000


@dataclass(frozen=True, slots=True)
class RenderLimits:
    """What one render may use. A conversation of a million tokens fits many times over."""

    cpu_s: float = 2.0
    """CPU time of the rendering thread, so that a busy machine does not refuse honest templates."""
    characters: int = 32_000_000
    """Of all text made on the way, intermediate results included."""
    elements: int = 1_000_000
    """Of all lists, tuples and dicts made on the way."""


class RenderLimitExceeded(TemplateRuntimeError):
    """The template used up one of its limits; the message says which."""


class Weight(NamedTuple):
    """Size of a value: elements of all its containers, characters of all its strings, levels of nesting."""

    elements: int
    characters: int
    depth: int


class Meter:
    """What is left to one render. Every method may raise `RenderLimitExceeded`."""

    def __init__(self, limits: RenderLimits) -> None:
        self.limits = limits
        self._deadline_s = time.thread_time() + limits.cpu_s
        self._characters_left = limits.characters
        self._elements_left = limits.elements

    def tick(self) -> None:
        if time.thread_time() > self._deadline_s:
            raise RenderLimitExceeded(f"it ran for more than {self.limits.cpu_s:g} s")

    def spend(self, *, characters: int = 0, elements: int = 0) -> None:
        assert characters >= 0 and elements >= 0, "a limit is never given back"
        self._characters_left -= characters
        self._elements_left -= elements
        if self._characters_left < 0:
            raise RenderLimitExceeded(f"it made more than {self.limits.characters} characters of text")
        if self._elements_left < 0:
            raise RenderLimitExceeded(f"it made more than {self.limits.elements} list and dict elements")

    def weigh(self, value: object) -> Weight:
        """A value as `str`, `==` or JSON would walk it: shared parts count each time they are met.

        Stops, by raising, as soon as the value is heavier than what is left.
        """
        elements = characters = deepest = 0
        pending: list[tuple[Any, int]] = [(value, 0)]
        while pending:
            item, depth = pending.pop()
            if isinstance(item, str):
                characters += len(item)
            elif isinstance(item, _CONTAINERS):
                deepest = max(deepest, depth + 1)
                elements += len(item)
                if elements > self._elements_left:
                    break  # Before its children are listed.
                pending.extend((child, depth + 1) for child in item)
                if isinstance(item, dict):
                    pending.extend((child, depth + 1) for child in item.values())
            if characters > self._characters_left:
                break
        if elements > self._elements_left or characters > self._characters_left:
            self.spend(characters=characters, elements=elements)
        return Weight(elements, characters, deepest)

    def take(self, value: Any) -> Any:
        """Charges for a value that has just been made, and returns it; an iterator becomes a list."""
        if isinstance(value, Iterator):
            value = list(itertools.islice(value, self._elements_left + 1))
        if isinstance(value, str):
            self.spend(characters=len(value))
        elif isinstance(value, _CONTAINERS):
            weight = self.weigh(value)
            self.spend(elements=weight.elements, characters=weight.characters)
        return value


_CONTAINERS: Final[tuple[type[Collection[Any]], ...]] = (
    dict,
    list,
    tuple,
    set,
    frozenset,
    KeysView,
    ValuesView,
    ItemsView,
)

_TEXT_METHODS: Final = frozenset(
    "capitalize casefold center count endswith find format format_map index isalnum isalpha isascii isdecimal"
    " isdigit islower isnumeric isspace istitle isupper join ljust lower lstrip partition removeprefix"
    " removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip"
    " swapcase title upper zfill".split()
)
_METHODS: Final[tuple[tuple[type, frozenset[str]], ...]] = (
    (str, _TEXT_METHODS),
    (dict, frozenset({"get", "items", "keys", "values", "copy"})),
    (list, frozenset({"index", "count", "copy"})),
    (tuple, frozenset({"index", "count", "grouper", "list"})),
)
_TEMPLATE_OBJECTS: Final = (Namespace, LoopContext, Macro, TemplateReference)

_FAST_FILTERS: Final = (
    "abs attr capitalize center count d default e escape first float forceescape indent int items join last"
    " length list lower map max min reject rejectattr replace reverse round safe select selectattr string"
    " trim upper"
).split()
_SLOW_FILTERS: Final = (
    "batch dictsort filesizeformat format groupby slice sort sum title truncate unique urlencode wordcount"
).split()

# Names with a space cannot be written in a template.
_TICK, _TAKEN, _JOINED = "meter tick", "meter take", "meter concat"


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Compiles and runs templates under a `Meter`. One environment may render in several threads at once."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, GenerationTag],
            optimized=False,  # Nothing is computed while compiling: no meter runs then.
            finalize=_finalize,
        )
        self._local = threading.local()
        self.globals = {"namespace": TemplateNamespace, "dict": dict, "range": self._range}
        self.filters = {name: self._wrapped(FILTERS[name], name) for name in (*_FAST_FILTERS, *_SLOW_FILTERS)}
        self.filters |= {"join": self._join, _TICK: self._tick, _TAKEN: self._take, _JOINED: self._concat}

    @property
    def meter(self) -> Meter:
        return self._local.meter  # type: ignore[no-any-return]

    def start(self, limits: RenderLimits) -> None:
        """Begins a render in this thread."""
        self._local.meter = Meter(limits)

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        self.filters[name] = self._wrapped(function, name)

    def _generate(self, source: nodes.Template, *arguments: Any, **options: Any) -> str:
        metered = _MeterEverything().visit(source)
        metered.set_environment(self)
        return super()._generate(metered, *arguments, **options)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        for kind, names in _METHODS:
            if isinstance(obj, kind):
                return attr in names
        return isinstance(obj, _TEMPLATE_OBJECTS)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text, formatted = value.__self__, wrapped

        def bounded(*args: Any, **kwargs: Any) -> str:
            _spend_for_format(self.meter, text, "{", (args, kwargs))
            return formatted(*args, **kwargs)

        return bounded

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805, B902
        # The names cannot clash with keyword arguments of the template.
        meter = __self.meter
        meter.tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            _spend_for_method(meter, owner, __obj.__name__, args)
        result = super().call(__context, __obj, *args, **kwargs)
        # A dict's methods hand out what is already there.
        return result if isinstance(owner, dict) else meter.take(result)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.meter.tick()
        _check_operands(self.meter, operator, left, right)
        result = self.binop_table[operator](left, right)
        return result if isinstance(result, str) else self.meter.take(result)

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        # Not `len`, which overflows on what a template may ask for. A range itself takes no room: its
        # iterations are counted as they happen.
        if abs(numbers.stop - numbers.start) // abs(numbers.step) > self.meter.limits.elements:
            raise RenderLimitExceeded(f"it asked for a range of more than {self.meter.limits.elements}")
        return numbers

    def _wrapped(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The filter, with its work bounded before and its result charged after."""

        def metered(*args: Any, **kwargs: Any) -> Any:
            self.meter.tick()
            # jinja2 puts its own context object first for filters that ask for it.
            given = args[1:] if hasattr(function, "jinja_pass_arg") else args
            _spend_for_filter(self.meter, name, given, kwargs)
            return self.meter.take(function(*args, **kwargs))

        return update_wrapper(metered, function)

    def _join(self, value: Any, d: str = "", attribute: str | int | None = None) -> str:
        self.meter.tick()
        items = self.meter.take(iter(value))
        if attribute is not None:
            items = self.meter.take(map(make_attrgetter(self, attribute), items))
        return self._concat(items, str(d))

    def _concat(self, items: list[Any], separator: str = "") -> str:
        self.meter.tick()
        characters = self.meter.weigh(items).characters
        self.meter.spend(characters=characters + len(separator) * len(items))
        return separator.join(map(str, items))

    def _tick(self, value: Any) -> Any:
        self.meter.tick()
        return value

    def _take(self, value: Any) -> Any:
        self.meter.tick()
        return self.meter.take(value)


class TemplateNamespace(Namespace):
    """As jinja2's, but shown without its contents: those may hold further namespaces, without end."""

    def __repr__(self) -> str:
        return "<Namespace>"


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks what the assistant said, for training. Here: plain."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _MeterEverything(NodeTransformer):
    """Rewrites a parsed template so that each step passes the meter."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        return self._tick_body(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        return self._tick_body(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        return self._tick_body(node)

    def visit_Block(self, node: nodes.Block) -> nodes.Node:
        self.generic_visit(node)
        return self._tick_body(node)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(node.data, lineno=node.lineno)  # Unlike template data, a constant is finalised.

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through(_JOINED, nodes.List(node.nodes, lineno=node.lineno))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        return _through(_TICK, node)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _through(_TAKEN, node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _through(_TAKEN, node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _through(_TAKEN, node) if node.ctx == "load" else node

    def _tick_body(self, node: Any) -> nodes.Node:
        tick = _through(_TICK, nodes.Const(None, lineno=node.lineno))
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node  # type: ignore[no-any-return]


def _through(name: str, node: nodes.Node) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    """Sees every value that is output. Taking the context keeps jinja2 from calling it while compiling."""
    environment = context.environment
    assert isinstance(environment, BoundedEnvironment)
    environment.meter.tick()
    if isinstance(value, str):
        environment.meter.spend(characters=len(value))
    elif isinstance(value, _CONTAINERS):
        weight = environment.meter.weigh(value)
        environment.meter.spend(elements=weight.elements, characters=weight.characters)
    return value


def _refuse_huge_sizes(values: tuple[Any, ...]) -> None:
    """Widths, counts and indents."""
    for value in values:
        if isinstance(value, int) and abs(value) > _SIZE_ARGUMENT_MAX:
            raise RenderLimitExceeded(f"it asked for a width or count of more than {_SIZE_ARGUMENT_MAX}")


def _check_operands(meter: Meter, operator: str, left: Any, right: Any) -> None:
    if operator == "%" and isinstance(left, str):
        _spend_for_format(meter, left, "%", right)
    elif operator == "+" and isinstance(left, str) and isinstance(right, str):
        meter.spend(characters=len(left) + len(right))
    elif operator == "*":
        _check_product(meter, left, right)
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * abs(right) > _BIG_INTEGER_BITS:
            raise RenderLimitExceeded("it computed a number that is too large")


def _check_product(meter: Meter, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > _BIG_INTEGER_BITS:
            raise RenderLimitExceeded("it computed a number that is too large")
    elif isinstance(left, int) or isinstance(right, int):
        times, sequence = (left, right) if isinstance(left, int) else (right, left)
        if isinstance(sequence, str):
            meter.spend(characters=len(sequence) * max(0, times))
        elif isinstance(sequence, list | tuple):
            meter.spend(elements=len(sequence) * max(0, times))


def _spend_for_method(meter: Meter, text: str, name: str, args: tuple[Any, ...]) -> None:
    """Charges for the text methods whose result can be far larger than the text.

    The result itself is charged again when it exists; only the order of magnitude matters here.
    """
    if name in ("center", "ljust", "rjust", "zfill"):
        _refuse_huge_sizes(args)
    elif name == "replace" and len(args) >= 2:
        _spend_for_replace(meter, text, args[0], args[1])
    elif name == "join" and args:
        items = args[0]
        characters = meter.weigh(items).characters
        count = len(items) if hasattr(items, "__len__") else 0
        meter.spend(characters=characters + len(text) * count)
    elif name in ("split", "rsplit", "splitlines"):
        separator = args[0] if args and isinstance(args[0], str) and args[0] else None
        meter.spend(elements=text.count(separator) if separator else len(text) // 2)


def _spend_for_replace(meter: Meter, text: str, old: object, new: object) -> None:
    if isinstance(old, str) and isinstance(new, str):
        meter.spend(characters=len(text) + text.count(old) * len(new))


def _spend_for_filter(meter: Meter, name: str, given: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    value = given[0] if given else None
    if name in _SLOW_FILTERS:
        weight = meter.weigh(value)
        if weight.elements + weight.characters > _SLOW_FILTER_WEIGHT:
            raise RenderLimitExceeded(f"it applied the filter `{name}` to a value that is too large")
    if name in ("batch", "center", "indent", "round", "slice", "truncate"):
        _refuse_huge_sizes((*given[1:], *kwargs.values()))
    if name == "format":
        _spend_for_format(meter, str(value), "%", (given[1:], kwargs))
    elif name == "replace":
        old, new = (*given[1:3], kwargs.get("old"), kwargs.get("new"))[:2]
        _spend_for_replace(meter, str(value), str(old), str(new))
    elif name == "indent":
        width = _width(kwargs.get("width", given[1] if len(given) > 1 else 4))
        meter.spend(characters=(str(value).count("\n") + 1) * width)
    elif name == "tojson":
        _spend_for_json(meter, value, (*given[1:], *kwargs.values()))
    elif name == "string":
        meter.weigh(value)
    elif name == "list" and isinstance(value, str):
        meter.spend(elements=len(value))


def _spend_for_json(meter: Meter, value: Any, options: tuple[Any, ...]) -> None:
    """Every element may bring a line of its own, indented by its depth, and a separator."""
    flat = [option for given in options for option in (given if isinstance(given, tuple | list) else [given])]
    width = sum(_width(option) for option in flat)
    weight = meter.weigh(value)
    meter.spend(characters=weight.characters + (weight.elements + 1) * (weight.depth + 1) * width)


def _width(given: Any) -> int:
    """An indent is a number of spaces or a text. Never negative: that would be a credit."""
    return len(given) if isinstance(given, str) else max(0, int(given or 0))


def _spend_for_format(meter: Meter, text: str, field_mark: str, arguments: object) -> None:
    """Formatting can widen every field, and repeat an argument in every field."""
    fields = _percent_fields(text) if field_mark == "%" else _brace_fields(text)
    widths = [int(digits[:9]) for field in fields for digits in re.findall(r"\d+", field)]
    if max(widths, default=0) > _FORMAT_WIDTH_MAX or any(mark in field for field in fields for mark in "*{"):
        raise RenderLimitExceeded("it formatted with a width that is computed or too large")
    characters = meter.weigh(arguments).characters
    meter.spend(characters=len(text) + len(fields) * (characters + _FORMAT_WIDTH_MAX))


def _percent_fields(text: str) -> list[str]:
    """Flags, width and precision of each `%` field."""
    return re.findall(r"%(?:\([^()]*\))?([-+ #0-9.*]*)", text)


def _brace_fields(text: str) -> list[str]:
    """The inside of each `{}` field, up to a nested one, whose mark is kept."""
    return re.findall(r"\{([^{}]*\{?)", text.replace("{{", "").replace("}}", ""))
