"""A user's own code, named in a recipe by a file or by a module: methods and reward functions.

A file's folder is a package of its own, under a name made of its path. What the file imports from beside it (modules,
packages) is found there first and nowhere else, so neighbours of one name in two folders are two modules, and none of
them can stand in the way of the standard library or of ours. For this the import statements of the file and of its
neighbours are given the package's name as they are compiled.

What crosses to other processes by value brings the sources along: imports inside functions work on nodes that have none
of the files.
"""

import ast
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from .errors import ConfigError, TutorloopError

OURS = frozenset({"tutorloop", *sys.stdlib_module_names})  # names that mean the same everywhere
SOURCES = "__own_sources__"  # what a module's imports name, so that its functions bring the sources along


def is_file(place: str) -> bool:
    """Whether `place` names a file, and not a module."""
    return "/" in place or place.endswith(".py")


def load_module(place: str, rule: str, label: str) -> ModuleType:
    """The module at `place`: a file runs once, and again after it or a neighbour has changed; a module is imported.

    Raises ConfigError: with the caller's `rule` where it is absent, `label` before what was found; or of what its own
    code raised, and where.
    """
    return _from_file(Path(place), rule, label) if is_file(place) else _from_name(place, rule, label)


def sources_of(module: ModuleType) -> "Sources | None":
    """Of a module that is a file; None of one that was imported."""
    return vars(module).get(SOURCES)


def package_of(module: ModuleType) -> ModuleType:
    """What to register with cloudpickle so that a module's functions and those of its neighbours travel by value."""
    sources = sources_of(module)
    return sys.modules[sources.package] if sources else module


def users_fault(what: str, error: BaseException, folder: str = "") -> ConfigError:
    """What a user's code, in `folder` where that is known, raised, with the place in that code."""
    if isinstance(error, SyntaxError):
        where, message = f"{error.filename or what} line {error.lineno or 1}: ", error.msg
    else:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _of_imports(frame.filename)]
        own = [frame for frame in frames if folder and frame.filename.startswith(f"{folder}/")] or frames
        where, message = (f"{own[-1].filename} line {own[-1].lineno}: " if own else ""), str(error)
    found = f"{where}{type(error).__name__}: {message}"
    return ConfigError("code of one's own runs without an error", found, f"mend {what}")


def _of_imports(file: str) -> bool:
    return file.startswith("<frozen ") or file == __file__ or Path(file).parent == Path(importlib.__file__).parent


def _from_file(path: Path, rule: str, label: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(rule, f"{label}{path}: no such file", "check the path")
    if path.suffix != ".py":
        raise ConfigError(rule, f"{label}{path} is no Python file", "name it FILE.py")
    path = path.resolve()
    sources = Sources.of(path.parent)
    stem = path.stem if path.stem.isidentifier() else f"file_{_digest(path.name)}"
    try:
        if sources.changed():
            sources.forget()
        sources.take_in(stem, path)
        return importlib.import_module(f"{sources.package}.{stem}")
    except TutorloopError:
        raise
    except (Exception, SystemExit) as error:
        sources.forget()
        raise users_fault(str(path), error, sources.folder) from error


def _from_name(name: str, rule: str, label: str) -> ModuleType:
    if not name or name.startswith("."):
        raise ConfigError(rule, f"{label}{name!r}", "write the module's full name")
    try:
        return importlib.import_module(name)
    except TutorloopError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise users_fault(name, error) from error
        raise ConfigError(rule, f"{label}{name}: {error}", "install it, set PYTHONPATH, or give FILE.py") from error
    except (Exception, SystemExit) as error:
        raise users_fault(name, error) from error


class Sources:
    """The Python files of one folder that a recipe's code is made of, by their names in the folder's package.

    Unpickled, they can be imported in that process.
    """

    def __init__(self, folder: str, files: dict[str, tuple[str, bytes]]) -> None:
        self.folder, self.files = folder, files  # name: path, source
        self.ran_before: list[str] = []  # where they were sent from, by their names
        self.package = f"own_{_digest(folder)}"

    @classmethod
    def of(cls, folder: Path) -> "Sources":
        """Those of a folder that this process knows; none at first."""
        return cls(str(folder), {})._known()

    def _known(self) -> "Sources":
        if _FINDER not in sys.meta_path:
            sys.meta_path.insert(0, _FINDER)
        known = _FINDER.packages.setdefault(self.package, self)
        known.files = self.files | known.files
        return known

    def __reduce__(self) -> tuple[Any, ...]:
        ran = [name.partition(".")[2] for name in sys.modules if name.startswith(f"{self.package}.")]
        return _arrived, (self.folder, self.files, ran)

    def changed(self) -> bool:
        """Whether a file is not what it was when it was taken in."""
        return any(_read(Path(path)) != source for path, source in self.files.values())

    def forget(self) -> None:
        """So that all is read and run anew."""
        self.files = {}
        for name in [name for name in sys.modules if f"{name}.".startswith(f"{self.package}.")]:
            del sys.modules[name]

    def take_in(self, name: str, path: Path) -> None:
        """A file, and every neighbour that it or they import anywhere."""
        if name in self.files:
            return
        source = path.read_bytes()
        self.files[name] = (str(path), source)
        try:
            tree = ast.parse(source, str(path))
        except (SyntaxError, ValueError):
            return  # told by whoever imports it
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for wanted, relative in _imports(tree, package):
            if relative or self.means_neighbour(wanted):
                parts = wanted.split(".")
                for end in range(1, len(parts) + 1):  # a.b.c runs a and a.b first
                    self._take_in_neighbour(".".join(parts[:end]))

    def _take_in_neighbour(self, name: str) -> None:
        file = self.neighbour(name) if name else None
        if file and file.is_file():
            self.take_in(name, file)

    def neighbour(self, name: str) -> Path | None:
        """The file of a module beside the user's, or the folder of one without __init__.py; None where none is."""
        place = Path(self.folder, *name.split("."))
        for file in (place / "__init__.py", place.with_name(f"{place.name}.py")):
            if file.is_file():
                return file
        return place if place.is_dir() and any(place.rglob("*.py")) else None

    def means_neighbour(self, name: str) -> bool:
        """Whether `import name` in one of these files means what lies beside them."""
        top = name.partition(".")[0]
        if top in OURS:
            return False
        if any(f"{file}.".startswith(f"{top}.") for file in self.files):
            return True
        file = self.neighbour(top)
        return file is not None and (file.is_file() or not _installed(top))

    def spec(self, name: str) -> ModuleSpec | None:
        """Of a module of this package by its name in it, "" being the package itself."""
        if name not in self.files:
            self._take_in_neighbour(name)
        full = f"{self.package}.{name}".rstrip(".")
        if name in self.files:
            path = self.files[name][0]
            spec = ModuleSpec(full, _Loader(self, name), origin=path, is_package=path.endswith("/__init__.py"))
            spec.has_location = True
            return spec
        inside = not name or any(file.startswith(f"{name}.") for file in self.files) or self.neighbour(name)
        return ModuleSpec(full, _Loader(self, name), is_package=True) if inside else None

    def code(self, name: str) -> CodeType:
        """Compiled, with the imports of neighbours renamed."""
        path, source = self.files.get(name, (self.folder, b""))
        return compile(_Renamed(self).visit(ast.parse(source, path)), path, "exec", dont_inherit=True)

    # ---- what the import statements of these files call ----

    def load(self, name: str) -> None:
        """A neighbour is there, with the parts of its package that were there before, and its name can be bound."""
        top = name.partition(".")[0]
        for part in [*(ran for ran in self.ran_before if ran.partition(".")[0] == top), name]:
            importlib.import_module(f"{self.package}.{part}")

    def ready(self) -> None:
        """Naming it brings the sources along, and unpickling them has made them ready."""


class _Loader(Loader):
    def __init__(self, sources: Sources, name: str) -> None:
        self.sources, self.name = sources, name

    def exec_module(self, module: ModuleType) -> None:
        vars(module)[SOURCES] = self.sources
        exec(self.sources.code(self.name), vars(module))

    def get_source(self, fullname: str) -> str:
        """For tracebacks where the file is not."""
        return self.sources.files.get(self.name, ("", b""))[1].decode("utf-8", "replace")


class _Finder(MetaPathFinder):
    """Finds the modules of all folders that this process knows."""

    def __init__(self) -> None:
        self.packages: dict[str, Sources] = {}

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        package, _, name = fullname.partition(".")
        sources = self.packages.get(package)
        return sources.spec(name) if sources else None


_FINDER = _Finder()


def _arrived(folder: str, files: dict[str, tuple[str, bytes]], ran: list[str]) -> Sources:
    sources = Sources(folder, files)._known()
    sources.ran_before = ran
    return sources


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=4).hexdigest()


def _imports(tree: ast.Module, package: str) -> Iterator[tuple[str, bool]]:
    """Names that a file imports, wherever in it, and whether from its own package; of `from a import b` a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".") if package else []
            base = above[: len(above) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            yield from ((".".join([*base, *last]), node.level > 0) for last in ([], *([a.name] for a in node.names)))


class _Renamed(ast.NodeTransformer):
    """Import statements of neighbours, under the name that they have here."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources

    def visit_Import(self, node: ast.Import) -> list[ast.stmt]:
        statements: list[ast.stmt] = []
        for alias in node.names:
            if not self.sources.means_neighbour(alias.name):
                statements.append(ast.Import([alias]))
                continue
            top = alias.name.partition(".")[0]
            bound = alias.name if alias.asname else top
            statements.append(_call("load", alias.name))
            statements.append(ast.Import([ast.alias(f"{self.sources.package}.{bound}", alias.asname or top)]))
        return [ast.fix_missing_locations(ast.copy_location(statement, node)) for statement in statements]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> list[ast.stmt]:
        if node.level == 0 and not self.sources.means_neighbour(node.module or ""):
            return [node]
        if node.level == 0:
            node.module = f"{self.sources.package}.{node.module}"
        return [ast.fix_missing_locations(ast.copy_location(_call("ready"), node)), node]


def _call(method: str, *arguments: str) -> ast.stmt:
    function = ast.Attribute(ast.Name(SOURCES, ast.Load()), method, ast.Load())
    return ast.Expr(ast.Call(function, [ast.Constant(argument) for argument in arguments], []))
