"""Command-line flags out of typed, frozen dataclasses: one field is one flag, the string under it is its help."""

import ast
import dataclasses
import functools
import inspect
import textwrap
import types
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Kind = Literal["value", "switch_on", "switch_off", "on_or_off", "list", "one_or_more", "append", "extend", "json"]


@dataclass(frozen=True)
class Flag:
    """One command-line flag, whoever declares it (slime's dataclasses or a table of another project's)."""

    names: tuple[str, ...]
    """Every spelling, the preferred one first."""
    dest: str
    """Attribute of the flat `args`."""
    kind: Kind
    """`value` one value; `switch_on/off` stores True/False; `on_or_off` also has a `--no-` form; `list` takes
    several values; `one_or_more` too, but a single one is stored bare; `append`/`extend` may be repeated; `json`
    parses JSON."""
    value_type: str = "str"
    """Name of the value's type: str, int, float, or one that `slime.arguments.values` knows."""
    default: Any = None
    choices: tuple[Any, ...] | None = None
    nargs: str | None = None
    help: str = ""
    group: str = ""
    fields: tuple[str, ...] = ()
    """Fields of Megatron-core's dataclasses that this flag sets; empty for any other flag."""
    const: Any = None
    """What a flag that may come without its value then means."""

    @property
    def is_switch(self) -> bool:
        """Whether the flag takes no value."""
        return self.kind in ("switch_on", "switch_off", "on_or_off")


def flag(
    default: Any = None,
    *,
    names: tuple[str, ...] = (),
    kind: Kind | None = None,
    nargs: str | None = None,
) -> Any:
    """A field whose flag differs from what its name and type say (spelling, repetition, `--disable-` form)."""
    metadata = {"names": names, "kind": kind, "nargs": nargs}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=functools.partial(type(default), default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@functools.cache
def flags_of(config_type: "type[DataclassInstance]") -> tuple[Flag, ...]:
    """The flags that a dataclass declares, in order, without help texts (see `help_texts`)."""
    hints = typing.get_type_hints(config_type)
    return tuple(_flag_of(field, hints[field.name], config_type) for field in dataclasses.fields(config_type))


def default_of(field: "dataclasses.Field[Any]") -> Any:
    """The default of a dataclass field, fresh if it is mutable."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _flag_of(field: "dataclasses.Field[Any]", hint: Any, config_type: type) -> Flag:
    inner, is_optional = _without_none(hint)
    origin, inner_args = typing.get_origin(inner), typing.get_args(inner)
    kind: Kind = field.metadata.get("kind") or _kind_of(inner, origin, is_optional, field.default)
    choices: tuple[Any, ...] | None = None
    value_type = inner
    if origin in (list, tuple):
        value_type = inner_args[0]
        origin, inner_args = typing.get_origin(value_type), typing.get_args(value_type)
    if origin is Literal:
        choices, value_type = inner_args, type(inner_args[0])
    return Flag(
        names=field.metadata.get("names") or ("--" + field.name.replace("_", "-"),),
        dest=field.name,
        kind=kind,
        value_type=value_type.__name__ if value_type in (str, int, float) else "str",
        default=default_of(field),
        choices=choices,
        nargs=field.metadata.get("nargs") or ("+" if kind in ("list", "extend") else None),
        group=config_type.__name__,
    )


def _kind_of(inner: Any, origin: Any, is_optional: bool, default: Any) -> Kind:
    if inner is bool:
        return "on_or_off" if is_optional or default is True else "switch_on"
    if origin is dict or inner is dict:
        return "json"
    return "list" if origin in (list, tuple) else "value"


def _without_none(hint: Any) -> tuple[Any, bool]:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        members = [a for a in typing.get_args(hint) if a is not type(None)]
        assert len(members) == 1, f"a flag has one type, not {hint}"
        return members[0], True
    return hint, False


def group_title(config_type: type) -> str:
    """First line of the class's docstring, which heads its group in `--help`."""
    return (inspect.getdoc(config_type) or config_type.__name__).splitlines()[0].rstrip(".")


@functools.cache
def help_texts(config_type: "type[DataclassInstance]") -> dict[str, str]:
    """Map each field to the string literal under it, read from the class's source.

    Raises:
        TypeError: a field has no string under it.
    """
    (class_def,) = ast.parse(textwrap.dedent(inspect.getsource(config_type))).body
    assert isinstance(class_def, ast.ClassDef)
    texts: dict[str, str] = {}
    for statement, following in zip(class_def.body, class_def.body[1:], strict=False):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                texts[name] = " ".join(text.split())
    without = {field.name for field in dataclasses.fields(config_type)} - texts.keys()
    if without:
        raise TypeError(
            f"{config_type.__name__} has fields without help text: {sorted(without)}. "
            "Write a string literal under each field; it becomes the flag's --help."
        )
    return texts


def with_help(config_type: "type[DataclassInstance]") -> tuple[Flag, ...]:
    """`flags_of`, each flag with its help text."""
    texts = help_texts(config_type)
    return tuple(dataclasses.replace(item, help=texts[item.dest]) for item in flags_of(config_type))
