"""How algorithms are found, and what happens when plugins misbehave."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
from checkpoints import DATA, VERIFIER
from installing import TOY, Install

from speculators import AlgorithmError, Checkpoint, PluginError, Registry, convert_model


def test_an_installed_plugin_is_found_under_its_name_and_its_alias(install: Install) -> None:
    registry = install("toy", TOY)

    assert registry.names == ["toy"]
    assert registry.get("toy").spec.summary == "Toy heads for tests"
    assert registry.get("plaything").spec.name == "toy"
    assert (registry.get("toy").package, registry.get("toy").version) == ("speculators-toy", "0.3.0")


def test_names_are_listed_without_importing_any_plugin(install: Install) -> None:
    registry = install("toy", "raise SystemExit('imported')")

    assert registry.names == ["toy"]


def test_our_own_algorithms_are_plugins_like_any_other() -> None:
    registry = Registry()

    assert registry.names == ["eagle", "eagle3", "hass"]
    assert registry.broken == []


def test_a_plugin_that_fails_to_import_is_reported_and_does_not_take_the_others_down(install: Install) -> None:
    install("toy", TOY)
    registry = install("bad", "import a_package_that_is_not_there")

    assert [algorithm.spec.name for algorithm in registry.algorithms] == ["toy"]
    assert [str(plugin) for plugin in registry.broken] == [
        "bad (speculators-bad 0.3.0): ModuleNotFoundError: No module named 'a_package_that_is_not_there'"
    ]
    with pytest.raises(PluginError, match=r"bad \(speculators-bad 0\.3\.0\): ModuleNotFoundError"):
        registry.get("bad")


def test_two_packages_with_one_name_are_an_error_that_names_both(install: Install) -> None:
    install("toy", TOY)
    install("other", TOY.replace('name = "toy"', 'name = "other"').replace('"plaything"', '"trinket"'))
    registry = install("toy", TOY, package="toys-r-us", version="2.0")

    with pytest.raises(PluginError, match=r"speculators-toy 0\.3\.0 and toys-r-us 2\.0 both bring"):
        registry.get("toy")
    assert registry.get("other").spec.name == "other"


def test_two_plugins_with_one_alias_must_be_told_apart(install: Install) -> None:
    install("toy", TOY)
    registry = install("other", TOY.replace('name = "toy"', 'name = "other"'))

    with pytest.raises(PluginError, match=r"alias of other \(.*\) and toy \("):
        registry.get("plaything")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        pytest.param("interface = 1", "interface = 7", "interface 7, this is 1", id="another interface"),
        pytest.param("    interface = 1\n", "", "lacks interface", id="no interface"),
        pytest.param("def examine", "def examin", "lacks examine", id="a method missing"),
        pytest.param('name = "toy"', 'name = "tyo"', "named 'toy', its spec 'tyo'", id="another name"),
        pytest.param("return Toy\n", "return 42\n", "does not return one ConverterSpec", id="nonsense returned"),
        pytest.param("options = ToyOptions", "options = int", "options is no subclass of Options", id="no schema"),
        pytest.param('("plaything",)', '"plaything"', "expected a tuple of names", id="one string of aliases"),
        pytest.param("@hookimpl\n", "", "does not return one ConverterSpec", id="no hook"),
        pytest.param("register_converter()", "register_convertor()", "unknown hook", id="a hook misspelt"),
        pytest.param(
            '"linear.weight", "H, 2*H"', '"linear.{0:L}.weight", "H"', "numbered places differ", id="a bad row"
        ),
        pytest.param(
            '"H, 2*H"),',
            '"H, 2*H"), Rename("other.weight", "linear.weight", "H"),',
            "two rows write 'linear.weight': 'toy.weight' and 'other.weight'",
            id="rows that write one name",
        ),
        pytest.param(
            "    table = Table((Rename", "    table = ((Rename", "table is .*, expected a Table", id="no table"
        ),
        pytest.param(
            "    options =", "    head = None\n    options =", "head is None, expected a string", id="no name"
        ),
        pytest.param(
            "    options =", "    buffers = 'd2t'\n    options =", "buffers is 'd2t', expected a tuple", id="one buffer"
        ),
        pytest.param(
            "    options =", "    nested = (1,)\n    options =", r"nested is \(1,\), expected a tuple", id="no blocks"
        ),
        pytest.param(
            "    options =",
            "    copies_embedding = 'yes'\n    options =",
            "copies_embedding is 'yes', expected True or False",
            id="a word for a truth",
        ),
        pytest.param("    options =", "    vllm = 'toy'\n    options =", "expected a Vllm or None", id="no Vllm"),
        pytest.param(
            "    def examine(",
            "    inspect = None\n\n    def examine(",
            "inspect is None, expected a method",
            id="no method",
        ),
        pytest.param(
            "    def examine(",
            "    def __init__(self, more): ...\n\n    def examine(",
            "cannot be made without arguments: TypeError",
            id="a constructor with arguments",
        ),
        pytest.param(
            "squash: bool = Field(",
            "squash: __import__('typing').Callable = Field(",
            "options has no schema: PydanticInvalidForJsonSchema",
            id="an option that JSON does not know",
        ),
        pytest.param(
            "squash: bool\n", "squash: 'Missing'\n", "config has no schema: .*Missing", id="no type of a field"
        ),
        pytest.param(
            '("plaything",)', '("auto",)', "the alias 'auto' of 'toy' asks the plugins", id="auto as an alias"
        ),
        pytest.param(
            '("plaything",)', '("toy",)', "the alias 'toy' of 'toy' is its own name", id="its name as an alias"
        ),
        pytest.param('("plaything",)', '("a toy",)', "the alias 'a toy' of 'toy' is none", id="a blank in an alias"),
        pytest.param(
            '("plaything",)', "(1,)", r"aliases is \(1,\), expected a tuple of names", id="a number as an alias"
        ),
        pytest.param("import speculators\n", "raise BaseException('no')\n", "BaseException: no", id="a bare exception"),
        pytest.param("import speculators\n", "raise GeneratorExit\n", "GeneratorExit: ", id="a generator's end"),
    ],
)
def test_a_plugin_that_breaks_the_contract_is_reported(install: Install, old: str, new: str, reason: str) -> None:
    assert old in TOY
    registry = install("toy", TOY.replace(old, new))

    with pytest.raises(PluginError, match=reason):
        registry.get("toy")


def test_with_nothing_installed_the_message_names_the_packages_to_install() -> None:
    message = r"no algorithm is installed.*pip install speculators-eagle speculators-eagle3 speculators-hass"

    with pytest.raises(AlgorithmError, match=message):
        Registry(EntryPoints(())).get("eagle3")


def test_auto_names_all_that_recognise_one_checkpoint(install: Install) -> None:
    eager = TOY.replace('set(source.tensors) == {"toy.weight"}', "True")
    install("toy", eager)
    registry = install("other", eager.replace('name = "toy"', 'name = "other"'))

    with pytest.raises(AlgorithmError, match="could be any of other, toy; choose one with --algorithm"):
        registry.recognise(Checkpoint(DATA / "eagle3"))


def test_a_plugin_that_exits_when_imported_does_not_end_the_command(install: Install) -> None:
    install("toy", TOY)
    registry = install("quitter", "raise SystemExit('bye')")

    assert [algorithm.spec.name for algorithm in registry.algorithms] == ["toy"]
    assert [plugin.reason for plugin in registry.broken] == ["SystemExit: bye"]


def test_a_plugin_that_raises_when_it_looks_at_a_checkpoint_is_named(install: Install) -> None:
    registry = install("toy", TOY.replace('set(source.tensors) == {"toy.weight"}', "1 / 0"))

    with pytest.raises(PluginError, match=r"speculators-toy 0\.3\.0 failed to look at .*ZeroDivisionError"):
        registry.recognise(Checkpoint(DATA / "eagle3"))


def test_auto_says_which_plugins_could_not_be_asked(install: Install, tmp_path: Path) -> None:
    registry = install("bad", "1 / 0")

    with pytest.raises(AlgorithmError, match=r"not asked, as they are broken: bad .*ZeroDivisionError"):
        convert_model(DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / "out", registry=registry)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, MemoryError])
def test_what_is_no_plugin_s_fault_ends_the_command(raised: type[BaseException], install: Install) -> None:
    registry = install("toy", f"raise {raised.__name__}")

    with pytest.raises(raised):
        registry.get("toy")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        pytest.param("auto", "its name 'auto' asks the plugins to look at the checkpoint", id="reserved"),
        pytest.param("a toy", "its name 'a toy' is none: it takes letters, digits", id="a blank"),
        pytest.param("-toy", "its name '-toy' is none", id="an option"),
        pytest.param("töy", "its name 'töy' is none", id="no ASCII"),
    ],
)
def test_a_plugin_whose_name_is_none_is_not_imported(name: str, reason: str, install: Install) -> None:
    registry = install(name, "raise AssertionError('imported')", package="speculators-toy")

    with pytest.raises(PluginError, match=reason):
        registry.get(name)


def test_an_alias_that_is_another_plugin_s_name_breaks_the_one_that_takes_it(install: Install) -> None:
    install("plaything", TOY.replace('name = "toy"', 'name = "plaything"').replace('("plaything",)', "()"))
    registry = install("toy", TOY)

    assert registry.get("plaything").spec.name == "plaything"
    with pytest.raises(
        PluginError, match=r"the alias 'plaything' of 'toy' is the name of speculators-plaything 0\.3\.0"
    ):
        registry.get("toy")


def test_an_entry_point_that_names_no_module_is_reported() -> None:
    registry = Registry(EntryPoints([EntryPoint("toy", "not a module!!", "speculators")]))

    with pytest.raises(PluginError, match="has the line 'toy = not a module!!', expected 'name = module'"):
        registry.get("toy")
