"""Which fields of which config dataclass a source reads: types are followed through names, attributes and annotations.

In: Python source, the config dataclasses. Out: (class, field) pairs. What is followed: annotated parameters and class
fields, assignments, `self.x`, `dataclasses.replace`, and sections such as `recipe.optim` whatever `recipe` is.
"""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Types = frozenset[type]
NOTHING: Types = frozenset()


def fields_read(source: str, configs: Sequence[type], aliases: Mapping[str, Any]) -> set[tuple[str, str]]:
    """(name of the class, name of the attribute) of every read that can be followed.

    Args:
        source: a module.
        configs: the dataclasses.
        aliases: names that annotations may use besides, such as unions of the dataclasses.
    """
    return _Reader(configs, aliases).read(ast.parse(source))


class _Reader:
    def __init__(self, configs: Sequence[type], aliases: Mapping[str, Any]) -> None:
        self._classes = {c.__name__: c for c in configs}
        self._aliases = {name: self._members(value) for name, value in aliases.items()}
        self._hints = {c: {k: self._members(v) for k, v in typing.get_type_hints(c).items()} for c in configs}
        # Whatever holds it, an attribute called recipe is one: `self.parts.recipe.optim`.
        self._known = {"recipe": frozenset(c for c in configs if c.__name__ == "Recipe")}
        self._found: set[tuple[str, str]] = set()

    def read(self, tree: ast.Module) -> set[tuple[str, str]]:
        self._block(tree, {}, {})
        return self._found

    def _members(self, hint: Any) -> Types:
        if hint in self._classes.values():
            return frozenset({hint})
        return frozenset(c for c in typing.get_args(hint) if c in self._classes.values())

    def _block(self, node: ast.AST, names: dict[str, Types], own: dict[str, Types]) -> None:
        """`names`: types of variables; `own`: of the attributes of self."""
        if isinstance(node, ast.ClassDef):
            own = self._own(node, names)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            names = dict(names)
            for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
                names[argument.arg] = self._annotated(argument.annotation)
            for assigned, value in _assignments(node):
                if isinstance(assigned, ast.Name):
                    names[assigned.id] = self._type(value, names, own)
        narrower = self._narrower(node)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Load):
                self._note(child, names, own)
            self._block(child, names | narrower.get(child, {}), own)

    def _narrower(self, node: ast.AST) -> dict[ast.AST, dict[str, Types]]:
        """The parts of a `match` or of an `if isinstance` in which a name has fewer types."""
        if isinstance(node, ast.Match) and isinstance(node.subject, ast.Name):
            classes = [(case, case.pattern.cls) for case in node.cases if isinstance(case.pattern, ast.MatchClass)]
            return {case: {node.subject.id: self._annotated(cls)} for case, cls in classes}
        if isinstance(node, ast.If) and isinstance(node.test, ast.Call) and ast.unparse(node.test.func) == "isinstance":
            name, classes_of = node.test.args
            if isinstance(name, ast.Name):
                return {statement: {name.id: self._annotated(classes_of)} for statement in node.body}
        return {}

    def _note(self, node: ast.Attribute, names: dict[str, Types], own: dict[str, Types]) -> None:
        self._found |= {(c.__name__, node.attr) for c in self._type(node.value, names, own)}

    def _own(self, node: ast.ClassDef, names: dict[str, Types]) -> dict[str, Types]:
        own = {
            item.target.id: self._annotated(item.annotation)
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        }
        for method in ast.walk(node):
            if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                inside = names | {
                    a.arg: self._annotated(a.annotation) for a in method.args.args + method.args.kwonlyargs
                }
                for assigned, value in _assignments(method):
                    if isinstance(assigned, ast.Attribute) and ast.unparse(assigned.value) == "self":
                        own[assigned.attr] = self._type(value, inside, {})
        return own

    def _annotated(self, annotation: ast.expr | None) -> Types:
        if annotation is None:
            return NOTHING
        found = NOTHING
        for part in ast.walk(annotation):
            name = part.id if isinstance(part, ast.Name) else part.attr if isinstance(part, ast.Attribute) else ""
            if name in self._classes:
                found |= {self._classes[name]}
            found |= self._aliases.get(name, NOTHING)
        return found

    def _type(self, node: ast.expr, names: dict[str, Types], own: dict[str, Types]) -> Types:
        if isinstance(node, ast.Name):
            return names.get(node.id, NOTHING)
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self" and own.get(node.attr):
                return own[node.attr]
            before = self._type(node.value, names, own)
            hinted = [self._hints[c][node.attr] for c in before if node.attr in self._hints[c]]
            return NOTHING.union(*hinted) if before else self._known.get(node.attr, NOTHING)
        if isinstance(node, ast.Tuple | ast.List):  # for what is taken out of it
            return NOTHING.union(*(self._type(item, names, own) for item in node.elts))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("replace") and node.args:
            return self._type(node.args[0], names, own)
        return NOTHING


def _assignments(function: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """(target, value), of tuples each pair, in the order of the source; of a loop what it goes over."""
    for node in ast.walk(function):
        if isinstance(node, ast.For | ast.comprehension):
            yield node.target, node.iter
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    yield from zip(target.elts, node.value.elts, strict=False)
                else:
                    yield target, node.value


def all_fields(configs: Sequence[type]) -> set[tuple[str, str]]:
    """(class, field) of all; `kind` of a union is read where the configuration is."""
    return {(c.__name__, f.name) for c in configs for f in dataclasses.fields(c) if f.name != "kind"}
