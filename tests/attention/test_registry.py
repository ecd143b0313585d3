import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from kvinv_plugins.full_kv import FullKV  # pyright: ignore[reportMissingImports]

from kvinv_pl.attention.registry import arguments_of, load_all, resolve, variants
from kvinv_pl.errors import UserError

Install = Callable[[str, str, str], None]

GOOD = '''
from kvinv_pl.attention import CPAttention

class {name}(CPAttention):
    """Does nothing.

    And says more about it.
    """

    def forward(self, k, v):
        return k, v
'''


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a distribution with one module and one entry point, as pip would leave it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def installer(distribution: str, entry_point: str, source: str) -> None:
        module = entry_point.partition("=")[2].partition(":")[0].strip()
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{distribution}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[kvinv_pl.attention]\n{entry_point}\n")

    return installer


def test_the_shipped_variant_is_found():
    full_kv = variants()["full_kv"]
    assert full_kv.cls is FullKV
    assert full_kv.error is None
    assert full_kv.distribution.startswith("kvinv-pl ")
    assert full_kv.summary == (FullKV.__doc__ or "").splitlines()[0]


def test_a_third_partys_variant_is_found_by_its_entry_point(install: Install):
    install("third_party", "nothing = reg_third:Nothing", GOOD.format(name="Nothing"))
    found = variants()["nothing"]
    assert found.cls is not None and found.cls.__name__ == "Nothing"
    assert (found.distribution, found.summary, found.error) == ("third_party 1.2", "Does nothing.", None)
    assert resolve("nothing") is resolve("Nothing") is found.cls
    assert list(variants()) == sorted(variants())


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "import a_library_that_is_not_there",
            "ModuleNotFoundError: No module named 'a_library_that_is_not_there'",
        ),
        ("def broken(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("class Other: pass", "has no attribute 'Bad'"),
        ("class Bad: pass", "is not a subclass of CPAttention"),
        ("Bad = 3", "is not a subclass of CPAttention"),
    ],
)
def test_a_broken_plugin_is_kept_with_its_error_and_reported(
    install: Install, caplog: pytest.LogCaptureFixture, tmp_path: Path, source: str, reason: str
):
    module = f"reg_broken_{abs(hash(source))}"
    install("sad", f"bad = {module}:Bad", source)
    with caplog.at_level(logging.WARNING):
        found = load_all()
    assert found["full_kv"].cls is FullKV
    bad = found["bad"]
    assert bad.cls is None and bad.error is not None and reason in bad.error and "\n" not in bad.error
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "sad 1.2" in caplog.text and reason in caplog.text


def test_a_broken_plugin_is_an_error_when_it_is_selected(install: Install):
    install("sad", "bad = reg_selected:Bad", "import a_library_that_is_not_there")
    with pytest.raises(
        UserError, match=r"the variant 'bad' of sad 1.2 is broken: .*a_library_that_is_not_there"
    ):
        resolve("bad")
    assert resolve("full_kv") is resolve("FullKV") is FullKV


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"no attention variant 'ful_kv': expected one of .*full_kv"):
        resolve("ful_kv")


def test_two_of_one_name_are_an_error_that_names_both_owners(install: Install):
    install("one", "same = reg_one:One", GOOD.format(name="One"))
    install("two", "same = reg_two:Two", GOOD.format(name="Two"))
    with pytest.raises(UserError, match="named 'same'") as error:
        variants()
    assert "reg_one:One of one 1.2" in str(error.value) and "reg_two:Two of two 1.2" in str(error.value)


def test_a_built_in_name_cannot_be_taken(install: Install):
    install("greedy", "full_kv = reg_greedy:Greedy", GOOD.format(name="Greedy"))
    with pytest.raises(UserError, match=r"greedy 1\.2.*kvinv-pl|kvinv-pl.*greedy 1\.2"):
        load_all()


def test_what_a_class_says_of_its_options_is_said_for_those_that_build_on_it() -> None:
    class Ground:
        """Has two options.

        Args:
            steps: How many.
            rate: How fast.
        """

    class Built(Ground):
        """Has a third, and its own rate.

        Args:
            rate: Slowly.
            seed: Of the noise.
        """

    class Silent(Built):
        pass

    assert arguments_of(Built) == {"steps": "How many.", "rate": "Slowly.", "seed": "Of the noise."}
    assert arguments_of(Silent) == arguments_of(Built)
