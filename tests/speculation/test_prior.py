# SPDX-License-Identifier: Apache-2.0
"""Step times before serving: what a sweep shows, and a file that may be missing, broken or written by two at once."""

from __future__ import annotations

import json
import os
import resource
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ext.speculation.prior import LEAST, MOST, fit_prior, load_prior, store_prior
from vllm_ext.speculation.step_time import COEFFICIENTS, DEFAULT_PRIOR, StepFeatures, StepTimeModel

TRUE = dict(zip(COEFFICIENTS, (12.0, 0.4, 5e-4, 0.05, 1.5, 0.02, 0.8), strict=True))
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


def measure(fixed: float, each: float) -> dict[int, float]:
    return {size: fixed + each * size for size in SIZES}


@given(st.floats(0.0, 100.0), st.floats(0.0, 10.0))
def test_a_line_is_found(step: float, token: float) -> None:
    if step + token < 1e-3:
        return
    prior = fit_prior(measure(step, token))
    assert prior["step"] == pytest.approx(step, abs=1e-6 * (step + token))
    assert prior["tokens"] == pytest.approx(token, abs=1e-6 * (step + token))
    assert set(prior) == set(COEFFICIENTS)


def test_what_was_not_measured_keeps_its_share_of_a_step() -> None:
    times = 10 * (DEFAULT_PRIOR["step"] + DEFAULT_PRIOR["tokens"])
    prior = fit_prior(measure(0.75 * times, 0.25 * times))
    for name in ("context_tokens", "requests", "passes", "drafted"):
        assert prior[name] == pytest.approx(10 * DEFAULT_PRIOR[name])


def test_a_drafter_that_was_timed_apart() -> None:
    """Its passes are its own, whatever share of a step a guess gives them."""
    prior = fit_prior(measure(12.0, 0.4), measure(3.0, 0.05))
    assert prior["passes"] == pytest.approx(3.0)
    assert prior["drafted"] == pytest.approx(0.05)
    assert (prior["step"], prior["tokens"]) == (pytest.approx(12.0), pytest.approx(0.4))


@pytest.mark.parametrize("times", [{}, {8: 1.0}, {1: 1.0, 2: 0.0}, {1: 1.0, 2: -1.0}, {1: 1.0, 2: float("inf")}])
def test_times_that_show_nothing(times: dict[int, float]) -> None:
    with pytest.raises(ValueError, match=r"need two sizes .*\[8?\]|must be positive milliseconds, got \{1: 1.0"):
        fit_prior(times)
    with pytest.raises(ValueError, match=r"need two sizes|must be positive milliseconds"):
        fit_prior(measure(1.0, 1.0), times)


def test_a_fit_outlives_the_engine(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "smartspec" / "model.json"
    assert load_prior(path) is None
    store_prior(path, TRUE)
    assert load_prior(path) == TRUE
    assert StepTimeModel(load_prior(path)).coefficients == pytest.approx(TRUE)
    assert [folder.stat().st_mode & 0o777 for folder in path.parents[:2]] == [0o700, 0o700]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "\x00\xff",
        '{"step": 1}',
        "[" * 100_000,
        '{"step":' * 100_000,
        json.dumps({**TRUE, "step": -1}),
        json.dumps({**TRUE, "step": True}),
        json.dumps({**TRUE, "step": "12"}),
        json.dumps({**TRUE, "step": float("nan")}),
        json.dumps({**TRUE, "step": float("inf")}),
        json.dumps({**TRUE, "step": MOST}),
        json.dumps({**TRUE, "step": 0, "tokens": 0.1 * LEAST}),
        json.dumps({**TRUE, "more": 1.0}),
        json.dumps(dict.fromkeys(COEFFICIENTS, 0.0)),
        json.dumps(TRUE)[:-1],
    ],
    ids=lambda text: text[:12],
)
def test_files_that_cannot_be_used(text: str, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(text, encoding="latin-1")
    assert load_prior(path) is None


def test_a_folder_in_the_files_place(tmp_path: Path) -> None:
    (tmp_path / "model.json").mkdir()
    assert load_prior(tmp_path / "model.json") is None
    with pytest.raises(OSError, match="directory"):
        store_prior(tmp_path / "model.json", TRUE)
    assert os.listdir(tmp_path) == ["model.json"]


@given(st.lists(st.floats(0.0, MOST, exclude_max=True), min_size=len(COEFFICIENTS), max_size=len(COEFFICIENTS)))
def test_whatever_is_loaded_can_be_fitted(values: list[float]) -> None:
    """A file of an accepted shape never stops the engine that learns from it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.json"
        path.write_text(json.dumps(dict(zip(COEFFICIENTS, values, strict=True))))
        prior = load_prior(path)
    if prior is None:
        assert values[0] + values[1] < LEAST
        return
    model = StepTimeModel(prior)
    for step in range(60):
        model.observe(StepFeatures(4 + step % 5, 2000, 4, step % 3, step % 5), 5.0 + step % 5)
    predicted = model.predict(StepFeatures(4, 2000, 4, 0, 0))
    assert 0 < predicted < float("inf")


def test_two_writers_and_a_reader(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    store_prior(path, TRUE)
    errors: list[Exception] = []
    done = threading.Event()
    readings = 0

    def write(step: float) -> None:
        try:
            for _ in range(400):
                store_prior(path, {**TRUE, "step": step})
        except OSError as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(step,)) for step in (1.0, 1e6 + 0.123456789)]

    def read() -> None:
        nonlocal readings
        while not done.is_set():
            prior = load_prior(path)
            if prior is None or prior["step"] not in (12.0, 1.0, 1e6 + 0.123456789):
                errors.append(AssertionError(f"read {prior}"))
            readings += 1

    reader = threading.Thread(target=read)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert errors == []
    assert readings > 10
    assert os.listdir(tmp_path) == ["model.json"]


@contextmanager
def limit_files(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    store_prior(path, TRUE)
    with limit_files(20), pytest.raises(OSError, match="File too large"):
        store_prior(path, {**TRUE, "step": 1.0})
    assert load_prior(path) == TRUE
    assert os.listdir(tmp_path) == ["model.json"]


@contextmanager
def without_privileges() -> Iterator[None]:
    """As a user for whom modes of folders count, where the tests run as root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_that_is_read_only() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        for path in (Path(folder) / "model.json", Path(folder) / "smartspec" / "model.json"):
            with without_privileges():
                with pytest.raises(PermissionError):
                    store_prior(path, TRUE)
                assert load_prior(path) is None
        assert os.listdir(folder) == []
        os.chmod(folder, 0o700)
