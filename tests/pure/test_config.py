"""Configuration: precedence, origins, and errors that name the key."""

from __future__ import annotations

import pytest

from penstock.core.config import Resolved, environment_name, resolve, setting_help
from penstock.core.errors import ConfigError
from penstock.policies.stack import load_preset, preset_names


def read(text: str | None = None, environ: dict[str, str] | None = None, **flags: object) -> Resolved:
    dotted = {key.replace("__", "."): value for key, value in flags.items()}
    return resolve(
        file_text=text,
        file_name="penstock.toml",
        environ=environ or {},
        flags=dotted,
        load_preset=load_preset,
    )


def test_flags_beat_environment_beats_file_beats_preset_beats_defaults() -> None:
    name = "PENSTOCK_REPLICA_STEP_TOKENS"
    text = 'preset = "vllm-v0"\n[replica]\nstep_tokens = 300\n'
    assert read().settings.replica.step_tokens == 512
    assert read('preset = "vllm-v0"').settings.replica.step_tokens == 2048
    assert read(text).settings.replica.step_tokens == 300
    assert read(text, {name: "200"}).settings.replica.step_tokens == 200
    resolved = read(text, {name: "200"}, replica__step_tokens=100)
    assert resolved.settings.replica.step_tokens == 100
    assert resolved.origins["replica.step_tokens"] == "flag"
    assert resolved.origins["policies.compose"] == "preset vllm-v0"
    assert resolved.origins["model"] == "default"


def test_a_single_slot_overrides_the_preset() -> None:
    settings = read('preset = "vllm-v0"\n[policies]\ncompose = "sarathi"\n').settings
    assert settings.policies.compose == "sarathi"


def test_a_flag_that_was_not_given_changes_nothing() -> None:
    assert read(gateway__port=None).origins["gateway.port"] == "default"


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_a_valid_stack(name: str) -> None:
    from penstock.policies.stack import make_stack

    make_stack(read(f'preset = "{name}"').settings.policies)
    assert load_preset(name)["summary"] and load_preset(name)["source"]


def test_slos_are_read_per_class() -> None:
    slo = read("[slo.chat]\nttft_p99_ms = 1000\ntpot_p99_ms = 100\n").settings.slo["chat"]
    assert (slo.ttft_ms, slo.tpot_ms, slo.e2e_ms) == (1000.0, 100.0, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle = 'x'", "`modle`.*Did you mean `model`"),
        ("[replica]\nruning_max = 3", "runing_max"),
        ("[replica]\nrunning_max = 0", "from 1 to 4096"),
        ("[replica]\nrunning_max = true", "must be an integer"),
        ("[replica]\nrunning_max = 2.5", "must be an integer"),
        ("[gateway]\ndrain_timeout_s = nan", "finite"),
        ("[gateway]\nstrict_fields = 'maybe'", "true or false"),
        ("[gateway]\napi_keys = [1]", "list of strings"),
        ("[gateway]\napi_keys = 1", "list of strings"),
        (f"[gateway]\ndrain_timeout_s = 1{'0' * 400}", "must be a number"),
        ("model = 3", "must be a string"),
        ("[slo.chat]\nttft_ms = 3", "ttft_p99_ms"),
        ("[slo.chat]\nttft_p99_ms = -3", "positive"),
        ("[slo]\nchat = 3", r"\[slo.chat\]"),
        ("slo = 3", r"\[slo.NAME\]"),
        ("tenants = 'acme'", r"\[tenants.NAME\]"),
        ("[tenants]\nacme = 3", r"\[tenants.acme\]"),
        ("[tenants.acme]\nwieght = 2", "Did you mean `tenants.acme.weight`"),
        ("[tenants.acme]\nweight = 0", "`tenants.acme.weight`.*from 0.001"),
        ("replica = 3", "`replica`"),
        ("this is not toml", "not valid TOML"),
        ('preset = "vlm"', "not a preset"),
    ],
)
def test_mistakes_name_the_key_and_the_way_out(text: str, message: str) -> None:
    import re

    with pytest.raises(ConfigError) as caught:
        read(text)
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)


def test_an_unknown_environment_name_is_an_error() -> None:
    with pytest.raises(ConfigError, match="PENSTOCK_GATEWAY_PROT"):
        read(environ={"PENSTOCK_GATEWAY_PROT": "1"})
    assert read(environ={"PENSTOCK_CACHE_DIR": "/x", "HOME": "/y"}).settings == read().settings


def test_environment_lists_and_secrets() -> None:
    resolved = read(environ={"PENSTOCK_GATEWAY_API_KEYS": "one, two"})
    assert resolved.settings.gateway.api_keys == ("one", "two")
    shown = {key: value for key, value, _ in resolved.shown()}
    assert shown["gateway.api_keys"] == "<2 set>"


def test_every_setting_is_documented_and_has_an_environment_name() -> None:
    names = [environment_name(key) for key, _, _ in setting_help()]
    assert len(set(names)) == len(names)
    assert all(help_text for _, help_text, _ in setting_help())
