"""Domain XML from Jinja templates: find, check, render.

A template is readable libvirt XML first: well-formed before it is rendered, Jinja only in text, in attributes and
around whole elements. Values are escaped always, unknown names are errors, so a value can never become an element.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from hvctl import rendering
from hvctl.errors import InvalidSpec, NotFound
from hvctl.model import Mode
from hvctl.values import dataclass

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)
_LIMIT_BYTES = 256 * 1024
# What XML 1.0 cannot carry at all (https://www.w3.org/TR/xml/#charsets), and line breaks, which no value of ours needs.
_FORBIDDEN = re.compile("[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True, kw_only=True)
class Template:
    """A template that was found: its name, mode and file."""

    name: str
    mode: Mode
    path: Path

    @property
    def is_builtin(self) -> bool:
        return self.path.is_relative_to(builtin_folder())

    @property
    def how_to_edit(self) -> str:
        return f"edit {shlex.quote(str(self.path))}"

    @property
    def purpose(self) -> str:
        """The first comment of the file, on one line: what it is for."""
        match = re.search(r"<!--(.*?)-->", _read(self.path), re.DOTALL)
        return " ".join(match.group(1).split()) if match else ""


def builtin_folder() -> Path:
    """Where the templates that come with hvctl lie: in the wheel beside the code, in a checkout at its top."""
    package = Path(__file__).parent
    inside = package / "domain_templates"
    return inside if inside.is_dir() else package.parent / "domain_templates"


def is_name(text: str) -> bool:
    """Whether a template is known by name, so that another host may have it, too; else it is a file."""
    return bool(NAME.fullmatch(text))


def get_template(mode: Mode, name: str, folders: Sequence[Path]) -> Template:
    """The template of this name, from the user's folders first, or the file itself when `name` is a path.

    Raises NotFound, or InvalidSpec for a name that is neither.
    """
    if "/" in name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise NotFound(f"there is no template file {name!r}", hint="hvctl template list")
        return Template(name=name, mode=mode, path=path.resolve())
    if not is_name(name):
        file = f"./{name}" if os.path.isfile(name) else "./mine.xml"
        raise InvalidSpec(
            f"{name!r} is not a template name", hint=f"names: hvctl template list; files: {shlex.quote(file)}"
        )
    for folder in (*folders, builtin_folder()):
        path = folder / mode / f"{name}.xml"
        if path.is_file():
            return Template(name=name, mode=mode, path=path)
    hint = f"a file: {shlex.quote(f'./{name}')}" if os.path.isfile(name) else "see which there are: hvctl template list"
    raise NotFound(f"there is no template {name!r} for mode {mode}", hint=hint)


def list_templates(folders: Sequence[Path]) -> tuple[Template, ...]:
    """All templates by mode and name; one of the user's hides a built-in one of the same name."""
    found: dict[tuple[Mode, str], Template] = {}
    for folder in (builtin_folder(), *reversed(folders)):
        for mode in Mode:
            for path in sorted((folder / mode).glob("*.xml")):
                found[mode, path.stem] = Template(name=path.stem, mode=mode, path=path)
    return tuple(found[key] for key in sorted(found))


def begin(mode: Mode) -> None:
    """Get ready to render the default template of a mode, beside what comes next."""
    rendering.begin(_read(builtin_folder() / mode / "default.xml"))


def render(template: Template, values: Mapping[str, object], variables: Mapping[str, str]) -> str:
    """The domain's XML. `values` are hvctl's own, `variables` what the user set (`vars.K` in the template).

    Raises InvalidSpec when the template is not well-formed before or after, uses an unknown name, or a value has
    control characters.
    """
    check_values(values)
    check_values(variables)
    check_well_formed(template)
    source = _read(template.path)
    try:
        text = rendering.render(source, {**values, "vars": dict(variables)})
    except rendering.RenderError as error:
        if error.is_undefined:
            raise InvalidSpec(
                f"template {template.name!r} uses a name that has no value: {error}", hint=_undefined_hint(str(error))
            ) from error
        raise InvalidSpec(
            f"template {template.name!r} cannot be rendered: {error}", hint=template.how_to_edit
        ) from error
    return _tidy(text, template)


def check_variables(template: Template, variables: Mapping[str, str]) -> None:
    """Raise InvalidSpec for a variable that the template does not ask for: a slip of the pen, or another template's."""
    if not variables:  # Jinja is loaded for it
        return
    try:
        known = rendering.find_variables(_read(template.path))
    except rendering.RenderError:
        return  # `render` says it, with all that goes with it
    for name in variables:
        if known is not None and name not in known:
            raise InvalidSpec(f"template {template.name!r} knows no {name!r}", hint=_known_hint(name, known))


def check_well_formed(template: Template) -> None:
    """Raise InvalidSpec with the line when the file is no well-formed XML as it stands, or not a `<domain>`."""
    source = _read(template.path)
    if "<!DOCTYPE" in source or "<!ENTITY" in source:
        raise InvalidSpec(f"template {template.name!r} declares a document type", hint="remove the <!DOCTYPE> part")
    try:
        root = ElementTree.fromstring(source)
    except ElementTree.ParseError as error:
        raise InvalidSpec(
            f"template {template.name!r} is not well-formed XML: {error}",
            hint=f"{template.how_to_edit}; Jinja may stand in text, in attributes and around whole elements",
        ) from error
    if root.tag != "domain":
        raise InvalidSpec(f"template {template.name!r} is no <domain> but <{root.tag}>", hint=template.how_to_edit)


def check_values(values: Mapping[str, object]) -> None:
    """Raise InvalidSpec when any text in there has a control character or a line break."""
    for name, text in _texts(values):
        if _FORBIDDEN.search(text):
            raise InvalidSpec(
                f"the value of {name!r} has a control character or line break: {text!r}", hint="remove it"
            )


def _texts(values: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        items = value if isinstance(value, tuple | list) else (value,)
        for item in items:
            for part in item if isinstance(item, tuple | list) else (item,):
                yield name, str(part)


def _tidy(text: str, template: Template) -> str:
    """Rendered XML, indented evenly, without the template's comments."""
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise InvalidSpec(
            f"template {template.name!r} gives XML that is not well-formed: {error}", hint=template.how_to_edit
        ) from error
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            raise InvalidSpec(f"template {str(path)!r} is larger than 256 KiB", hint="hvctl template list")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise NotFound(f"cannot read template {str(path)!r}: {error.strerror}", hint="hvctl template list") from error
    except UnicodeDecodeError as error:
        raise InvalidSpec(f"template {str(path)!r} is not UTF-8 text", hint="save it as UTF-8") from error


def _known_hint(name: str, known: frozenset[str]) -> str:
    if not known:
        return "it takes no --set at all; another may: hvctl template list"
    import difflib  # here: a slip alone needs it

    meant = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean {meant[0]}? " if meant else "") + f"it knows: {', '.join(sorted(known))}"


def _undefined_hint(message: str) -> str:
    match = re.search(r"has no attribute '([A-Za-z0-9_]+)'", message)
    return (
        f"give it a value: --set {match.group(1)}=..." if match else "see the known names: hvctl template show default"
    )
