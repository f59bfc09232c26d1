"""One self-contained Python file from the source text of some classes and all they need.

The definitions are copied as they are written, with their comments and docstrings, so that there is
no second implementation. Methods that cannot be called from the given classes are left out. A
method is kept if code that is kept uses its name as an attribute; a use as `self.name` counts only
in classes of the same family. Annotations need no definition, because they are not evaluated; the
types that they name become `Any`.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

from ddiff.errors import ArgumentError

AVAILABLE = ("torch", "transformers", "numpy")
"""Packages that a generated file may import, in addition to the standard library."""

REPLACED = {
    ("ddiff.plugin.config", "ComponentConfig"): ("ddiff.runs.hub.standins", "ComponentConfig"),
    ("pydantic", "Field"): ("ddiff.runs.hub.standins", "Field"),
}
"""Definitions that are replaced by simpler ones."""

OWN_PACKAGE = "ddiff"
"""Package whose definitions are copied, in addition to the packages of the roots."""

CHECKS = "pydantic"
"""Package whose decorators mark methods that only check settings; these are left out."""

ENTRIES = ("forward", "backward")
"""Methods that torch calls."""

EXCLUDED = (("ddiff.nn.denoiser", "Denoiser.forward"), ("ddiff.nn.heads", "Head.total"))
"""Methods that only the training in ddiff calls, although other code uses their names."""

UNUSED_METHODS = ("__repr__", "__str__", "__reduce__")
"""Special methods that are left out. The other special methods of a kept class are kept."""


class Place(NamedTuple):
    """Module and name of a definition at the top level."""

    module: str
    name: str


class Imported(NamedTuple):
    """Import of a name from a package that the generated file may import.

    `name` is None for `import module`, and `bound` the name that the import binds.
    """

    module: str
    name: str | None
    bound: str


T = TypeVar("T")
Statement = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


def generate_source(
    roots: Iterable[Place],
    entries: Iterable[str],
    header: str,
    footer: Callable[[Mapping[Place, str]], str] | None = None,
) -> str:
    """Return the source of one file with the definitions `roots` and all that they need.

    Args:
        roots: definitions that other programs use.
        entries: names of the methods that other programs call.
        header: text of the module docstring.
        footer: footer(names) returns the code at the end of the file. `names` has the name of each
            definition in the file, because equal names of two modules get numbers.

    Raises ArgumentError, which names the package, if a definition needs a package other than those
    in `AVAILABLE`.
    """
    roots = list(roots)
    packages = {OWN_PACKAGE, *(_top_package(root.module) for root in roots)}
    collection = _Collection({*ENTRIES, *entries}, packages)
    for root in roots:
        collection.add(root)
    collection.finish()
    text = collection.write(header)
    return text if footer is None else f"{text}\n\n{footer(collection.names)}\n"


# ---------------------------------------------------------------------- modules


class _Module:
    """Source of a module, and the names that it binds at the top level."""

    def __init__(self, name: str) -> None:
        self.name = name
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ArgumentError(f"The source of the module {name} is not available.")
        path = Path(spec.origin)
        # The stub of a package with lazy imports lists its public names.
        if path.with_suffix(".pyi").exists():
            path = path.with_suffix(".pyi")
        self.is_package = path.stem == "__init__"
        self.text = path.read_text(encoding="utf-8")
        self.lines = self.text.splitlines()
        self.tree = ast.parse(self.text)
        self.definitions: dict[str, Statement] = {}
        self.imports: dict[str, Imported] = {}
        self._read(self.tree.body)

    def _read(self, body: list[ast.stmt]) -> None:
        for statement in body:
            if isinstance(statement, ast.FunctionDef | ast.ClassDef):
                self.definitions[statement.name] = statement
            elif isinstance(statement, ast.Assign | ast.AnnAssign):
                for name in _assigned_names(statement):
                    self.definitions[name] = statement
            elif isinstance(statement, ast.Import):
                for alias in statement.names:
                    bound = alias.asname or alias.name.partition(".")[0]
                    self.imports[bound] = Imported(alias.name, None, bound)
            elif isinstance(statement, ast.ImportFrom):
                module = self._absolute(statement)
                for alias in statement.names:
                    bound = alias.asname or alias.name
                    self.imports[bound] = Imported(module, alias.name, bound)
            elif isinstance(statement, ast.If):  # if TYPE_CHECKING
                self._read(statement.body)

    def _absolute(self, statement: ast.ImportFrom) -> str:
        """Return the absolute name of the module of a `from` import."""
        if not statement.level:
            return statement.module or ""
        package = self.name if self.is_package else self.name.rpartition(".")[0]
        for _ in range(statement.level - 1):
            package = package.rpartition(".")[0]
        return f"{package}.{statement.module}" if statement.module else package


def _assigned_names(statement: ast.Assign | ast.AnnAssign) -> Iterator[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    for target in targets:
        for node in ast.walk(target):
            if isinstance(node, ast.Name):
                yield node.id


def _top_package(module: str) -> str:
    return module.partition(".")[0]


def _is_available(module: str) -> bool:
    root = _top_package(module)
    return root in sys.stdlib_module_names or root in AVAILABLE


# ---------------------------------------------------------------------- references


@dataclass
class _References(ast.NodeVisitor):
    """Names that a piece of code uses.

    Attributes:
        names: global or local names.
        attributes: names of attributes, except those in `own`.
        own: names of attributes of `self`, `cls` and `super()`.
        annotations: names in annotations.
    """

    names: set[str] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)
    own: set[str] = field(default_factory=set)
    annotations: set[str] = field(default_factory=set)

    def visit_Name(self, node: ast.Name) -> None:
        self.names.add(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = node.value
        is_self = isinstance(owner, ast.Name) and owner.id in ("self", "cls")
        is_super = (
            isinstance(owner, ast.Call)
            and isinstance(owner.func, ast.Name)
            and owner.func.id == "super"
        )
        (self.own if is_self or is_super else self.attributes).add(node.attr)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._read_annotation(node.annotation)
        self.visit(node.target)
        if node.value is not None:
            self.visit(node.value)

    def visit_arg(self, node: ast.arg) -> None:
        self._read_annotation(node.annotation)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._read_annotation(node.returns)
        self.visit(node.args)
        for part in (*node.decorator_list, *node.body):
            self.visit(part)

    def _read_annotation(self, annotation: ast.expr | None) -> None:
        if annotation is not None:
            names = (node.id for node in ast.walk(annotation) if isinstance(node, ast.Name))
            self.annotations.update(names)


def _references(*nodes: ast.AST | None) -> _References:
    found = _References()
    for node in nodes:
        if node is not None:
            found.visit(node)
    return found


def _evaluated_parts(node: ast.stmt) -> Iterator[ast.AST]:
    """Yield the parts of a statement that are evaluated when it is executed."""
    if isinstance(node, ast.FunctionDef):
        yield from node.decorator_list
        yield from node.args.defaults
        yield from (default for default in node.args.kw_defaults if default is not None)
    elif isinstance(node, ast.ClassDef):
        yield from (*node.decorator_list, *node.bases, *node.keywords)
        for member in node.body:
            yield from _evaluated_parts(member)
    elif isinstance(node, ast.AnnAssign):
        if node.value is not None:
            yield node.value
    else:
        yield node


# ---------------------------------------------------------------------- definitions


@dataclass
class _Class:
    """Class of which only the members that are used are copied.

    Attributes:
        key: module, and name with the names of the enclosing classes.
        pending: methods and nested classes that are not used so far.
        bases: places of the base classes.
    """

    key: Place
    pending: dict[str, ast.FunctionDef | ast.ClassDef]
    bases: list[Place]


class _Collection:
    """Definitions of a generated file, which grow until all names are defined.

    Only definitions of `packages` are copied.
    """

    def __init__(self, entries: set[str], packages: set[str]) -> None:
        self.packages = packages
        self.modules: dict[str, _Module] = {}
        self.kept: dict[Place, Statement] = {}
        self.classes: dict[Place, _Class] = {}
        self.imports: set[Imported] = set()
        self.attributes = entries
        self.own: set[tuple[Place, str]] = set()
        self.annotations: dict[str, set[str]] = {}
        self.used_modules: dict[str, set[str]] = {}

    def add(self, place: Place) -> None:
        """Keep a definition, and everything that it needs."""
        place = Place(*REPLACED.get(place, place))
        module = self._module(place.module)
        statement = module.definitions[place.name]
        if place in self.kept:
            return
        self.kept[place] = statement
        if isinstance(statement, ast.ClassDef):
            self._add_class(place, statement)
        else:
            self._use(place.module, _references(statement), None)

    def finish(self) -> None:
        """Keep the used members of classes, and repeat until no member is added."""
        found = True
        while found:
            found = False
            for each in list(self.classes.values()):
                for name in list(each.pending):
                    if self._is_used(each, name):
                        found = True
                        self._keep_member(each, each.pending.pop(name))

    def _module(self, name: str) -> _Module:
        if name not in self.modules:
            self.modules[name] = _Module(name)
        return self.modules[name]

    def _add_class(self, key: Place, node: ast.ClassDef) -> None:
        """Keep a class with its attributes and special methods."""
        bases = [self._resolve(key.module, name) for base in node.bases for name in _roots(base)]
        known = [base for base in bases if isinstance(base, Place)]
        entry = _Class(key, {}, known)
        self.classes[key] = entry
        self._use(key.module, _references(*node.decorator_list, *node.bases, *node.keywords), key)
        for member in node.body:
            if isinstance(member, ast.AnnAssign):
                self._add_settings(key.module, member.annotation)
            if isinstance(member, ast.ClassDef):
                entry.pending[member.name] = member
            elif not isinstance(member, ast.FunctionDef):
                self._use(key.module, _references(member), key)
            elif self._is_left_out(key, member):
                continue
            elif member.name.startswith("__"):
                self._keep_member(entry, member)
            else:
                entry.pending[member.name] = member

    def _add_settings(self, module: str, annotation: ast.expr) -> None:
        """Keep the settings classes that the type of an attribute names."""
        # A table of a recipe becomes an object of the class in its annotation, which is the only
        # annotation that is evaluated.
        for name in _roots(annotation):
            found = self._resolve(module, name)
            if isinstance(found, Place) and found.module in self.modules:
                statement = self.modules[found.module].definitions[found.name]
                bases = statement.bases if isinstance(statement, ast.ClassDef) else []
                if "ComponentConfig" in {*_roots(*bases)}:
                    self.add(found)

    def _keep_member(self, entry: _Class, member: ast.FunctionDef | ast.ClassDef) -> None:
        key = Place(entry.key.module, f"{entry.key.name}.{member.name}")
        if isinstance(member, ast.ClassDef):
            self._add_class(key, member)
        else:
            self.kept_members.add(id(member))
            self._use(key.module, _references(member), entry.key)

    @cached_property
    def kept_members(self) -> set[int]:
        """Ids of the nodes of the methods that are kept."""
        return set()

    def _is_left_out(self, key: Place, member: ast.FunctionDef) -> bool:
        """Return whether a method of the class `key` is never copied."""
        is_excluded = (key.module, f"{key.name}.{member.name}") in EXCLUDED
        if is_excluded or member.name in UNUSED_METHODS:
            return True
        imports = self._module(key.module).imports
        found = (imports.get(name) for name in _roots(*member.decorator_list))
        return any(each is not None and each.module == CHECKS for each in found)

    def _is_used(self, entry: _Class, name: str) -> bool:
        if name in self.attributes:
            return True
        return any(
            other == name and (self._inherits(entry.key, user) or self._inherits(user, entry.key))
            for user, other in self.own
        )

    def _inherits(self, key: Place, ancestor: Place) -> bool:
        """Return whether the class `key` is the class `ancestor` or inherits from it."""
        if key == ancestor:
            return True
        entry = self.classes.get(key)
        return entry is not None and any(self._inherits(base, ancestor) for base in entry.bases)

    def _use(self, module: str, references: _References, owner: Place | None) -> None:
        """Keep what a piece of code in `module` uses. `owner`: the class that contains it."""
        self.attributes |= references.attributes
        if owner is None:
            self.attributes |= references.own
        else:
            self.own |= {(owner, name) for name in references.own}
        self.annotations.setdefault(module, set()).update(references.annotations)
        for name in sorted(references.names):
            found = self._resolve(module, name)
            if isinstance(found, Place):
                self.used_modules.setdefault(module, set()).add(found.module)
                self.add(found)
            elif found is not None:
                self._add_import(found)

    def _add_import(self, imported: Imported) -> None:
        if not _is_available(imported.module):
            raise ArgumentError(
                f"A definition needs {imported.bound} of {imported.module}, but the file of a "
                f"saved model can import only {' and '.join(AVAILABLE)}."
            )
        self.imports.add(imported)

    def _resolve(self, module: str, name: str) -> Place | Imported | None:
        """Find the definition or import of a global name; None for a local or built-in name."""
        known = self._module(module)
        if name in known.definitions:
            return Place(module, name)
        imported = known.imports.get(name)
        if imported is None:
            return None
        if imported.name is not None:
            replaced = REPLACED.get((imported.module, imported.name))
            if replaced is not None:
                return Place(*replaced)
            if _top_package(imported.module) in self.packages:
                return self._resolve(imported.module, imported.name) or imported
        return imported

    # ------------------------------------------------------------------ text

    def write(self, header: str) -> str:
        """Return the text of the file."""
        names = self.names
        body = []
        module = ""
        for place in self.ordered:
            if place.module != module:
                module = place.module
                body.append(f"\n\n# {'-' * 70} {module}\n")
            body.append(self._copy(place, names))
        definitions = "\n".join(body)
        imports = self._write_imports()
        parts = [f'"""{header}"""', "from __future__ import annotations", imports]
        placeholders = self._write_placeholders()
        if placeholders:
            parts.append(placeholders)
        return "\n\n".join(parts) + definitions + "\n"

    @cached_property
    def names(self) -> dict[Place, str]:
        """Name of each definition in the file. Equal names get a number."""
        names: dict[Place, str] = {}
        taken = {imported.bound for imported in self.imports}
        for place in self.ordered:
            name = place.name
            number = 2
            while name in taken:
                name = f"{place.name}_{number}"
                number += 1
            taken.add(name)
            names[place] = name
        return names

    @cached_property
    def ordered(self) -> list[Place]:
        """Definitions, each after those that it needs when it is executed.

        Definitions of a module stay together and in their order, as far as this is possible.
        """
        modules = _sort_topologically(
            sorted({place.module for place in self.kept}),
            lambda module: sorted(self.used_modules.get(module, ())),
        )
        rank = {module: number for number, module in enumerate(modules)}
        preferred = sorted(
            self.kept, key=lambda place: (rank[place.module], self.kept[place].lineno)
        )
        return _sort_topologically(preferred, self._needed_places)

    def _needed_places(self, place: Place) -> Iterator[Place]:
        """Yield the kept definitions that must exist when a definition is executed."""
        for name in sorted(_references(*_evaluated_parts(self.kept[place])).names):
            found = self._resolve(place.module, name)
            if isinstance(found, Place) and found in self.kept:
                yield found

    def _copy(self, place: Place, names: dict[Place, str]) -> str:
        """Return the source text of a definition without the members that are not used."""
        module = self.modules[place.module]
        statement = self.kept[place]
        first = _first_line(module, statement)
        last = _last_line(module, statement)
        dropped = set(self._dropped_lines(module, statement))
        edits = self._edits(place, names)
        lines = []
        for number in range(first, last + 1):
            if number in dropped:
                continue
            line = module.lines[number - 1]
            for start, stop, text in sorted(edits.get(number, []), reverse=True):
                line = line[:start] + text + line[stop:]
            lines.append(line)
        is_long = isinstance(statement, ast.FunctionDef | ast.ClassDef)
        blank = "\n\n" if is_long else ""
        return blank + "\n".join(lines)

    def _dropped_lines(self, module: _Module, node: ast.stmt) -> Iterator[int]:
        if not isinstance(node, ast.ClassDef):
            return
        for member in node.body:
            if isinstance(member, ast.ClassDef):
                key = next(
                    (each for each in self.classes if self._is_node(each, member)),
                    None,
                )
                if key is not None:
                    yield from self._dropped_lines(module, member)
                    continue
            elif not isinstance(member, ast.FunctionDef) or id(member) in self.kept_members:
                continue
            first = _first_line(module, member)
            while not module.lines[first - 2].strip():
                first -= 1
            yield from range(first, (member.end_lineno or first) + 1)

    def _is_node(self, key: Place, node: ast.ClassDef) -> bool:
        """Return whether the kept class `key` is the class of a node."""
        return self.kept_nodes.get(key) is node

    @cached_property
    def kept_nodes(self) -> dict[Place, ast.ClassDef]:
        """Nodes of all kept classes, including nested classes."""
        nodes: dict[Place, ast.ClassDef] = {}
        for key in self.classes:
            outer, *inner = key.name.split(".")
            node = self.modules[key.module].definitions[outer]
            for name in inner:
                assert isinstance(node, ast.ClassDef)
                node = next(
                    member
                    for member in node.body
                    if isinstance(member, ast.ClassDef) and member.name == name
                )
            assert isinstance(node, ast.ClassDef)
            nodes[key] = node
        return nodes

    def _edits(self, place: Place, names: dict[Place, str]) -> dict[int, list[tuple]]:
        """Return the replacements (start, stop, text) of names in a definition, by line."""
        edits: dict[int, list[tuple]] = {}
        statement = self.kept[place]
        module = self.modules[place.module]

        def replace(line: int, column: int, old: str, new: str) -> None:
            # Columns of the syntax tree count bytes of UTF-8.
            start = len(module.lines[line - 1].encode()[:column].decode())
            edits.setdefault(line, []).append((start, start + len(old), new))

        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                found = self._resolve(place.module, node.id)
                new = names.get(found) if isinstance(found, Place) else None
                if new is not None and new != node.id:
                    replace(node.lineno, node.col_offset, node.id, new)
        own = names[place]
        if own != place.name and isinstance(statement, ast.FunctionDef | ast.ClassDef):
            keyword = "def " if isinstance(statement, ast.FunctionDef) else "class "
            column = statement.col_offset + len(keyword)
            replace(statement.lineno, column, place.name, own)
        return edits

    def _write_imports(self) -> str:
        """Return the import statements of the file, those of the standard library first."""
        plain = set()
        named: dict[str, set[str]] = {}
        for module, name, bound in self.imports | set(self._annotation_imports()):
            if module == "__future__":
                continue
            if name is None:
                plain.add((module, "" if bound == _top_package(module) else f" as {bound}"))
            else:
                alias = name if name == bound else f"{name} as {bound}"
                named.setdefault(module, set()).add(alias)
        named.setdefault("typing", set()).add("Any")
        lines = [(module, f"import {module}{alias}") for module, alias in plain]
        for module, aliases in named.items():
            lines.append((module, f"from {module} import {', '.join(sorted(aliases))}"))
        groups = []
        for is_standard in (True, False):
            texts = []
            for module, text in lines:
                if (_top_package(module) in sys.stdlib_module_names) == is_standard:
                    texts.append(text)
            groups.append("\n".join(sorted(texts, key=lambda text: (text[:4] == "from", text))))
        return "\n\n".join(group for group in groups if group)

    def _annotation_imports(self) -> Iterator[Imported]:
        for _, found in self._annotated():
            if isinstance(found, Imported) and _is_available(found.module):
                yield found

    def _annotated(self) -> Iterator[tuple[str, Place | Imported]]:
        """Yield the names in annotations, with their definition or import."""
        for module, names in self.annotations.items():
            for name in sorted(names):
                found = self._resolve(module, name)
                if found is not None:
                    yield name, found

    def _write_placeholders(self) -> str:
        """Return assignments of `Any` to types that only annotations name."""
        defined = set(self.names.values())
        defined |= {imported.bound for imported in self.imports}
        defined |= {imported.bound for imported in self._annotation_imports()}
        missing = {name for name, _ in self._annotated()} - defined
        if not missing:
            return ""
        lines = [f"{name} = Any" for name in sorted(missing)]
        return "\n".join(["# Types that are only used in annotations.", *lines])


def _sort_topologically(items: Iterable[T], needed: Callable[[T], Iterable[T]]) -> list[T]:
    """Sort items such that each follows those that it needs; otherwise their order is kept.

    The items that are needed are added. A cycle is broken at the item that comes first: modules may
    use each other, which `graphlib.TopologicalSorter` refuses.
    """
    ordered: list[T] = []
    seen: set[T] = set()

    def visit(item: T) -> None:
        if item in seen:
            return
        seen.add(item)
        for each in needed(item):
            visit(each)
        ordered.append(item)

    for item in items:
        visit(item)
    return ordered


def _roots(*nodes: ast.AST) -> Iterator[str]:
    """Yield the names in expressions, such as `nn` in `nn.Module`."""
    for node in nodes:
        yield from (each.id for each in ast.walk(node) if isinstance(each, ast.Name))


def _first_line(module: _Module, node: ast.stmt) -> int:
    """Return the number of the first line of a statement, with decorators and comments above."""
    first = node.lineno
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        first = min([first, *(decorator.lineno for decorator in node.decorator_list)])
    while first > 1 and _is_comment_of(module.lines[first - 2]):
        first -= 1
    return first


def _is_comment_of(line: str) -> bool:
    """Return whether a line is a comment, and not the heading of a section."""
    text = line.strip()
    return text.startswith("#") and not text.startswith("# ---")


def _last_line(module: _Module, node: Statement) -> int:
    """Return the number of the last line of a statement, with the docstring below an assignment."""
    last = node.end_lineno or node.lineno
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return last
    body = module.tree.body
    following = body[body.index(node) + 1 :][:1]
    for statement in following:
        is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if is_text and statement.lineno == last + 1:
            last = statement.end_lineno or last
    return last
