"""YAML as version 1.2 of its core schema reads it, on PyYAML's parser, whose own reading is 1.1's.

In 1.1 `yes` is true, 010 is 8, 1:30 is 90, 1e3 is text, and of two equal keys the first is lost. Here only true and
false are booleans, and a key may stand once. A number with leading zeros stays text: a setting
that is a number reads 010 as ten, one that is text reads 007 as it was written. Keys are always text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
# What a plain scalar is, in this order, by its first character
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),  # 1.1's, and harmless
)
_MOST = 100_000  # settings in a file; a few aliases of aliases can stand for billions


class DuplicateKey(yaml.YAMLError):
    """One key or setting in two places."""

    def __init__(self, name: str, first: int, second: int) -> None:
        super().__init__(name)
        self.name, self.first, self.second = name, first, second


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's way)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}

    def construct_number(self, node: Any) -> Any:
        return number(self.construct_scalar(node))

    def construct_boolean(self, node: Any) -> Any:
        return self.construct_scalar(node).lower() == "true"


class _Dumper(yaml.SafeDumper):
    """Quotes what 1.1 or 1.2 would take for something else than text."""

    def represent_text(self, text: str) -> Any:
        # In double quotes rare ends of lines are escaped; PyYAML folds them elsewhere, and reads them as spaces
        escaped = any(c in text for c in "\x85\u2028\u2029")
        return self.represent_scalar(_TAG + "str", text, style='"' if escaped else None)


for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)
    if _name in ("int", "float"):
        _Dumper.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)
        _Loader.add_constructor(_TAG + _name, _Loader.construct_number)
_Loader.add_constructor(_TAG + "bool", _Loader.construct_boolean)
_Loader.add_constructor(_TAG + "map", _Loader.construct_mapping)
_Dumper.add_representer(str, _Dumper.represent_text)
_NUMBER = re.compile(f"(?:{_SCALARS[2][1]}|{_SCALARS[3][1]})")


def number(text: str) -> int | float | str:
    """The number that a text is to YAML, or the text."""
    if not _NUMBER.fullmatch(text):
        return text
    try:
        return int(text, 0)
    except ValueError:
        if text.lstrip("+-").isdigit():  # by the thousand, which Python refuses to read
            return text
        return float(re.sub(r"\.(inf|nan)", r"\1", text, flags=re.IGNORECASE))


def read(text: str) -> tuple[Any, dict[str, int]]:
    """A document, and the lines of its settings by dotted name.

    Raises: yaml.YAMLError; DuplicateKey for a key that stands twice in a mapping, and for a setting that is given
        twice, by a dotted key and a nested one.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        lines: dict[str, int] = {}
        _find_lines(node, "", lines, ())
        return loader.construct_document(node), {name: line for name, line in lines.items() if name}
    finally:
        loader.dispose()


def value(text: str) -> Any:
    """What stands after `=` on a command line: a value of YAML's, where `#` begins no comment.

    What YAML cannot read to its end is taken as text.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None or text[node.end_mark.index :].strip():
            return text.strip() or None
        _find_lines(node, "", {}, ())
        return loader.construct_document(node)
    except DuplicateKey:
        raise
    except (yaml.YAMLError, RecursionError):
        return text.strip()
    finally:
        if loader:
            loader.dispose()


def dump(tree: Any) -> str:
    """YAML that versions 1.1 and 1.2 read alike."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _find_lines(node: yaml.Node, name: str, lines: dict[str, int], above: tuple[int, ...]) -> None:
    """Fill in the line of everything that a node holds.

    Raises: DuplicateKey; ConstructorError for keys that are no text.
    """
    if id(node) in above or len(lines) > _MOST:
        problem = "it refers to itself" if id(node) in above else "it holds too much"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        for number_, item in enumerate(node.value, 1):
            if not isinstance(item, yaml.ScalarNode):
                _find_lines(item, f"{name}[{number_}]", lines, above)
    if not isinstance(node, yaml.MappingNode):
        return
    own: dict[str, int] = {}
    for key, inner in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key has to be text", key.start_mark)
        line, dotted = key.start_mark.line + 1, f"{name}.{key.value}" if name else key.value
        if key.value in own:
            raise DuplicateKey(dotted, own[key.value], line)
        own[key.value] = line
        if not isinstance(inner, yaml.MappingNode):
            if dotted in lines:
                raise DuplicateKey(dotted, lines[dotted], line)
            lines[dotted] = line
        if key.tag != _TAG + "merge":
            _find_lines(inner, dotted, lines, above)
