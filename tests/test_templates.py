"""Templates: golden files, libvirt's schema, and values that would like to be more than text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hvctl import templates
from hvctl.backends import get_backend
from hvctl.config import Config
from hvctl.errors import InvalidSpec, NotFound
from hvctl.host import Host
from hvctl.instances import examples
from hvctl.libvirtapi import schema
from hvctl.model import Mode
from tests.payloads import PAYLOADS

GOLDEN = Path(__file__).parent / "golden"
BUILTIN = [(item.mode, item.name) for item in templates.list_templates(())]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """Settings with a fixed store, on no libvirt at all, as on a host with lxcfs and without systemd."""
    monkeypatch.setattr("hvctl.hostside.daemons.has_systemd", lambda: False)
    monkeypatch.setattr("hvctl.hostside.daemons.has_lxcfs", lambda: True)
    return Host(Config(store=Path("/var/lib/hvctl"), run=tmp_path, template_folders=(tmp_path,)))


@pytest.mark.parametrize(("mode", "name"), BUILTIN)
def test_a_template_renders_as_its_golden_file(
    host: Host, mode: Mode, name: str, request: pytest.FixtureRequest
) -> None:
    rendered = examples.render_example(host, mode, name, {})
    file = GOLDEN / f"{mode}-{name}.xml"
    if request.config.getoption("--update-golden"):
        file.write_text(rendered)
    assert rendered == file.read_text()


@pytest.mark.parametrize(("mode", "name"), BUILTIN)
def test_libvirt_takes_what_a_template_gives(host: Host, mode: Mode, name: str) -> None:
    examples.check(host, mode, name, {})


def test_libvirts_schema_refuses_what_it_does_not_know(host: Host) -> None:
    xml = examples.render_example(host, Mode.VM, "default", {}).replace("<devices>", "<devices><nonsense/>")
    with pytest.raises(InvalidSpec, match="not valid"):
        schema.check_domain(xml)


def test_every_template_says_what_it_is_for() -> None:
    assert all(item.purpose for item in templates.list_templates(()))


def shape(xml: str) -> list[tuple[str, tuple[str, ...]]]:
    """The tree without its texts: each element's tag and attribute names, in document order."""
    return [(element.tag, tuple(element.attrib)) for element in ElementTree.fromstring(xml).iter()]


def free_texts(mode: Mode) -> Iterator[str]:
    """Values of templates that hold text from outside (names, paths): those that are strings in the example."""
    record = examples.make_record(mode, "default", Path("/store"), {})
    values = get_backend(mode).format_values(Host(Config()), record, examples.IMAGE)
    yield from sorted(name for name, value in values.items() if isinstance(value, str) and value)


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize(
    ("mode", "name", "field"), [(mode, name, field) for mode, name in BUILTIN for field in free_texts(mode)]
)
def test_a_value_stays_a_text(host: Host, mode: Mode, name: str, field: str, payload: str) -> None:
    """Refused for a control character, or there as it was, the tree's shape being that of harmless values."""
    template = templates.get_template(mode, name, ())
    record = examples.make_record(mode, name, host.store.root, {})
    harmless = dict(get_backend(mode).format_values(host, record, examples.IMAGE))
    try:
        xml = templates.render(template, {**harmless, field: payload}, {})
    except InvalidSpec:
        assert re.search("[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff\ufffe\uffff]", payload)
        return
    assert shape(xml) == shape(templates.render(template, harmless, {}))
    if f"{{{{ {field} }}}}" in template.path.read_text():
        assert payload.strip() in ElementTree.tostring(
            ElementTree.fromstring(xml), "unicode", method="text"
        ) + " ".join(value for element in ElementTree.fromstring(xml).iter() for value in element.attrib.values())


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_variable_stays_a_text(host: Host, tmp_path: Path, payload: str) -> None:
    (tmp_path / "vm").mkdir()
    (tmp_path / "vm" / "mine.xml").write_text('<domain a="{{ vars.X }}"><title>{{ vars.X }}</title></domain>')
    template = templates.get_template(Mode.VM, "mine", (tmp_path,))
    try:
        xml = templates.render(template, {}, {"X": payload})
    except InvalidSpec:
        return
    root = ElementTree.fromstring(xml)
    assert (root.attrib["a"], root.findtext("title")) == (payload, payload)
    assert shape(xml) == [("domain", ("a",)), ("title", ())]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("<domain>", "not well-formed"),
        ("no xml", "not well-formed"),
        ("<network/>", "no <domain>"),
        ("<domain>{{ nosuch }}</domain>", "no value"),
        ("<domain>{{ vars.missing }}</domain>", "no value"),
        ("<domain>{{ 1 / 0 }}</domain>", "cannot be rendered"),
        ("<domain>{% if %}</domain>", "cannot be rendered"),
        ("<domain>{{ name | safe }}</domain>", "not well-formed"),
        ('<!DOCTYPE d [<!ENTITY x "y">]><domain>&x;</domain>', "document type"),
    ],
)
def test_a_bad_template_is_named_with_its_fault(tmp_path: Path, source: str, reason: str) -> None:
    file = tmp_path / "bad.xml"
    file.write_text(source)
    template = templates.get_template(Mode.VM, str(file), ())
    with pytest.raises(InvalidSpec, match=reason):
        templates.render(template, {"name": "<b>"}, {})


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("<domain/>", "takes no --set at all"),
        ("<domain>{{ tmp }} vars.tmp</domain>", "takes no --set at all"),
        ("<domain>{% if vars.tpm is defined %}x{% endif %}</domain>", "did you mean tpm? it knows: tpm"),
        ("<domain>{{ vars['tpm'] }}{{ vars.speed | default(1) }}</domain>", "it knows: speed, tpm"),
        ("<domain>{% macro m(x) %}{{ vars.speed }}{{ x }}{% endmacro %}{{ m(1) }}</domain>", "it knows: speed"),
        ("<domain>{{ vars.tmp }}</domain>", ""),
        ("<domain>{% macro m(x) %}{{ vars.tmp }}{{ x }}{% endmacro %}{{ m(1) }}</domain>", ""),
        ("<domain>{% for key, value in vars.items() %}{{ key }}{% endfor %}</domain>", ""),
        ("<domain>{{ vars.get('tmp') }}{{ vars[name] }}</domain>", ""),
        ("<domain>{{ vars | length }}</domain>", ""),
        ("<domain>{% if %}</domain>", ""),
    ],
)
def test_a_variable_that_nothing_asks_for_is_refused(tmp_path: Path, source: str, reason: str) -> None:
    file = tmp_path / "mine.xml"
    file.write_text(source)
    template = templates.get_template(Mode.VM, str(file), ())
    templates.check_variables(template, {})
    if not reason:
        templates.check_variables(template, {"tmp": "2.0"})
        return
    with pytest.raises(InvalidSpec, match="knows no 'tmp'") as refused:
        templates.check_variables(template, {"tmp": "2.0"})
    assert reason in refused.value.hint


def test_a_template_of_the_users_hides_a_builtin_one(tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir()
    (tmp_path / "vm" / "default.xml").write_text("<domain/>")
    assert not templates.get_template(Mode.VM, "default", (tmp_path,)).is_builtin
    assert len(templates.list_templates((tmp_path,))) == len(templates.list_templates(()))


@pytest.mark.parametrize("name", ["nosuch", "./nosuch.xml", "/etc"])
def test_an_unknown_template_is_not_found(name: str) -> None:
    with pytest.raises(NotFound):
        templates.get_template(Mode.VM, name, ())


@pytest.mark.parametrize("name", ["my2.xml", "My 2.xml"])
def test_a_file_beside_one_is_named_by_its_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("<domain/>")
    with pytest.raises((NotFound, InvalidSpec)) as refused:
        templates.get_template(Mode.VM, name, ())
    path = shlex.split(refused.value.hint.rpartition(": ")[2])[0]
    assert templates.get_template(Mode.VM, path, ()).path.read_text() == "<domain/>"


@pytest.mark.parametrize("name", ["..", "-f", "a b", "x" * 300, "a\0b", "\u202eabc"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(InvalidSpec):
        templates.get_template(Mode.VM, name, ())
