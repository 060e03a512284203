"""Settings: one default per value, and every mistake named in the user's own words."""

from __future__ import annotations

import pytest

from service.settings import (
    ALL_SETTINGS,
    CommonSettings,
    LocalSettings,
    SchedulerSettings,
    WorkerSettings,
    flag,
    known_variables,
)
from wire.errors import ConfigError


def test_a_flag_beats_the_environment_which_beats_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert SchedulerSettings.load().max_batch_requests == 64
    monkeypatch.setenv("FOREBAY_MAX_BATCH_REQUESTS", "7")
    assert SchedulerSettings.load().max_batch_requests == 7
    assert SchedulerSettings.load(max_batch_requests=8).max_batch_requests == 8


def test_a_flag_that_was_not_given_leaves_the_environment_in_force(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FOREBAY_NAMESPACE", "mine")
    assert CommonSettings.load(namespace=None).namespace == "mine"


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_MAX_MODEL_LEN", "")
    assert WorkerSettings.load(model="m.gguf").max_model_len is None


def test_an_unknown_variable_is_refused_with_the_closest_known_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FOREBAY_MAX_BATCH_TOKEN", "7")
    with pytest.raises(
        ConfigError,
        match=r"^FOREBAY_MAX_BATCH_TOKEN is not a setting .* did you "
        r"mean FOREBAY_MAX_BATCH_TOKENS\?$",
    ):
        CommonSettings.load()


def test_a_variable_of_another_service_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_TENSOR_PARALLEL_SIZE", "2")
    SchedulerSettings.load()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_batch_tokens": 0}, r"^--max-batch-tokens is 0: .*greater than or equal to 1$"),
        ({"max_batch_tokens": "many"}, r"^--max-batch-tokens is 'many': .*integer"),
        ({"namespace": "a:b"}, r"^--namespace is 'a:b': "),
        ({"log_level": "loud"}, r"^--log-level is 'loud': .*'debug', 'info'"),
        ({"redis_url": "http://example.org"}, r"^--redis cannot be used: .*redis://"),
        ({"redis_url": "redis://"}, r"^--redis cannot be used: the URL has no host$"),
        ({"redis_url": "unix:relative"}, r"^--redis cannot be used: .*unix:///path"),
    ],
)
def test_a_bad_flag_is_one_line_with_its_value(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        SchedulerSettings.load(**flags)
    assert "\n" not in str(caught.value)


def test_a_group_has_time_to_try_a_heartbeat_again() -> None:
    WorkerSettings.load(model="m.gguf", heartbeat_ms=500, group_timeout_ms=750)
    with pytest.raises(ConfigError, match=r"^--heartbeat-ms is 501: .* every 500 or more often"):
        WorkerSettings.load(model="m.gguf", heartbeat_ms=501, group_timeout_ms=750)
    with pytest.raises(ConfigError, match=r"^FOREBAY_HEARTBEAT_MS is 2000: .* every 500"):
        WorkerSettings.load(model="m.gguf", group_timeout_ms=750)


def test_a_bad_variable_is_called_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_FLUSH_MS", "soon")
    with pytest.raises(ConfigError, match=r"^FOREBAY_FLUSH_MS is 'soon': "):
        WorkerSettings.load(model="m.gguf")


def test_what_is_missing_is_asked_for_by_flag_and_variable() -> None:
    with pytest.raises(ConfigError, match=r"^--model is missing: give it, or set FOREBAY_MODEL$"):
        WorkerSettings.load()


def test_a_password_appears_in_no_message_and_no_representation() -> None:
    with pytest.raises(ConfigError) as caught:
        CommonSettings.load(redis_url="http://user:hunter2@example.org")
    assert "hunter2" not in str(caught.value)
    settings = CommonSettings.load(redis_url="redis://user:hunter2@example.org:6380/1")
    assert "hunter2" not in repr(settings)
    assert settings.redis_url_for_logs == "redis://user:***@example.org:6380/1"


def test_the_stub_engine_may_be_given_a_step_time() -> None:
    assert WorkerSettings.load(model="stub:").stub_step_s == 0
    assert WorkerSettings.load(model="stub:2.5ms").stub_step_s == 0.0025
    assert WorkerSettings.load(model="stub:2.5ms").model_path is None
    with pytest.raises(ConfigError, match=r"^--model is 'stub:fast': the stub engine is stub:, or"):
        WorkerSettings.load(model="stub:fast")


def test_sizes_are_written_as_people_write_them() -> None:
    assert WorkerSettings.load(model="m", kv_cache_bytes="512MiB").kv_cache_bytes == 512 * 2**20


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        CommonSettings.load().namespace = "other"  # type: ignore[misc]


def test_the_state_directory_follows_the_base_directory_specification(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
    assert str(LocalSettings.load().resolved_state_dir) == "/somewhere/forebay"
    assert str(LocalSettings.load(state_dir="/else").resolved_state_dir) == "/else"


def test_a_field_means_the_same_wherever_it_appears() -> None:
    by_flag: dict[str, str] = {}
    defaults: dict[str, object] = {}
    for cls in ALL_SETTINGS:
        for name, field in cls.model_fields.items():
            assert field.description, f"{cls.__name__}.{name} has no description"
            assert by_flag.setdefault(flag(cls, name), name) == name
            assert defaults.setdefault(name, field.default) == field.default
    assert len(defaults) == len(known_variables())
