"""What an operator sets: open only to this machine without keys, and a key file's mistakes named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from router_ml.errors import InputError
from serving.keys import ApiKey, read_api_keys
from serving.settings import Settings, is_loopback

ONE, TWO, THREE = "1" * 64, "a" * 64, "b" * 64


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert is_loopback(host)
    assert Settings(bundle=Path("b"), host=host).host == host


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "192.168.1.5", "128.0.0.1", "localhost.example.org", "127.1", "x"]
)
def test_beyond_loopback_keys_are_needed(host: str) -> None:
    with pytest.raises(InputError, match=r"no API keys are configured.*ROUTER_ML_API_KEYS.*127"):
        Settings(bundle=Path("b"), host=host)
    settings = Settings(bundle=Path("b"), host=host, api_keys={"gateway": ONE})
    assert ONE not in repr(settings)


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": -1},
        {"port": 65536},
        {"max_body_bytes": 10},
        {"max_messages": 0},
        {"max_candidates": 0},
        {"request_seconds": 0.0},
        {"request_seconds": float("nan")},
        {"watch_seconds": -1.0},
        {"drain_seconds": -0.1},
        {"commit_seconds": 0.0},
    ],
)
def test_a_value_out_of_range_is_named(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Settings(bundle=Path("b"), **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"k": "plain text"}, {"": ONE}, {"k": {"sha256": ONE, "scopes": ["root"]}}])
def test_a_key_that_is_none_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match="API key"):
        Settings(bundle=Path("b"), api_keys=wrong)  # type: ignore[arg-type]


def test_settings_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings(bundle=Path("b")).port = 1  # type: ignore[misc]


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(f'[gateway]\nsha256 = "{ONE}"\n[batch]\nsha256 = "{TWO}"\n')
    assert read_api_keys(path, None) == {"gateway": ApiKey("gateway", ONE), "batch": ApiKey("batch", TWO)}
    assert read_api_keys(None, f"gateway={ONE}, other={TWO}") == {
        "gateway": ApiKey("gateway", ONE),
        "other": ApiKey("other", TWO),
    }
    assert read_api_keys(path, f"gateway={THREE}")["gateway"].sha256 == THREE
    path.write_text(
        f'[a]\nsha256 = "{ONE}"\nscopes = ["admin"]\nmodels = ["m"]\ntiers = ["t"]\ndata_classes = ["c"]\ntenant = "x"'
    )
    assert read_api_keys(path, None) == {"a": ApiKey("a", ONE, ("admin",), ("m",), ("t",), ("c",), "x")}
    turned = read_api_keys(path, f"a={TWO}")["a"]  # a new hash in the environment keeps the bounds
    assert turned == ApiKey("a", TWO, ("admin",), ("m",), ("t",), ("c",), "x")
    with pytest.raises(InputError, match="the same hash"):
        read_api_keys(path, f"b={ONE}")
    assert read_api_keys(None, None) == read_api_keys(None, "") == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no API keys"),
        ("[gateway]", "key 'gateway' has to be a table with 'sha256'"),
        ("gateway = 'x'", "key 'gateway' has to be a table"),
        ("[gateway]\nsha256 = 'secret'", "key 'gateway' needs its SHA-256"),
        ("[gateway]\nsha256 = 7", "key 'gateway' needs its SHA-256"),
        (f"[gateway]\nsha256 = '{ONE}'\nscopes = ['root']", "there are route, outcomes, health, admin"),
        (f"[gateway]\nsha256 = '{ONE}'\nmodels = 'gpt'", "'models' has to be a list"),
        (f"[gateway]\nsha256 = '{ONE}'\ntiers = [1]", "'tiers' has to be a list"),
        (f"[gateway]\nsha256 = '{ONE}'\ntenant = 1", "'tenant' has to be a name"),
        (f"[gateway]\nsha256 = '{ONE}'\nmodel = ['gpt']", "no other"),
        (f"[gateway]\nsha256 = '{TWO.upper()}'", "lower-case hex"),
        (f"[gateway]\nsha256 = '{ONE}'\nscopes = []", "leave it out for no bound"),
        ("not toml", "cannot be read"),
    ],
)
def test_a_key_files_mistake_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=says) as caught:
        read_api_keys(path, None)
    assert str(path) in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize("variable", ["gateway", f"={ONE}", "gateway=short", ","])
def test_a_wrong_variable_is_named(variable: str) -> None:
    with pytest.raises(InputError, match="ROUTER_ML_API_KEYS"):
        read_api_keys(None, variable)


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.toml cannot be read"):
        read_api_keys(tmp_path / "none.toml", None)
