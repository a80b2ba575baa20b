"""Options and fixtures that several test files share. Tests run on one thread without network."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import golden_cases
import pytest
import tiny
import torch

torch.set_num_threads(1)

COMMITTED = Path(__file__).parent / "goldens"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--goldens",
        type=Path,
        default=COMMITTED,
        help="folder with reference data: the whole set instead of the part in tests/goldens",
    )
    parser.addoption(
        "--method",
        action="append",
        default=[],
        metavar="FILE.py:Class",
        help="your own method: the property tests run on it as on the methods of the registry",
    )
    parser.addoption(
        "--pretended-cuda",
        action="store_true",
        help="run tests/gpu on a pretended device where there is no CUDA device",
    )


def pytest_configure(config: pytest.Config) -> None:
    reset_signals()
    config.addinivalue_line(
        "markers", "goldens(*patterns, complete=False): run once for each case of golden_cases.py"
    )
    for spec in config.getoption("--method"):
        from minillava.pruning import METHODS, load_file_method

        try:
            method = load_file_method(spec)
        except ValueError as error:
            raise pytest.UsageError(f"--method: {error}") from None
        if method.name in METHODS:
            raise pytest.UsageError(f"--method: {method.name!r} exists; choose another name")
        METHODS[method.name] = method


def reset_signals() -> None:
    """Handle signals as a program started in a terminal does. One that nohup or a shell starts in
    the background ignores some of them, and so would the programs that the tests start."""
    handlers = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL}
    for name, handler in {**handlers, "SIGHUP": signal.SIG_DFL}.items():
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handler)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if marker := metafunc.definition.get_closest_marker("goldens"):
        root = metafunc.config.getoption("--goldens")
        found = golden_cases.cases(root, *marker.args, **marker.kwargs)
        metafunc.parametrize("golden", found, ids=str)


@pytest.fixture(scope="session")
def goldens(request: pytest.FixtureRequest) -> Path:
    """Folder with the reference data."""
    return request.config.getoption("--goldens")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders of random models by the patches along a side of an image, see tiny.grid_for."""
    return {g: tiny.write_folder(tmp_path_factory, image_size=14 * g) for g in (4, 6)}


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random model with four decoder layers, grouped-query attention and 16 tokens per image."""
    return tiny.write_model(tmp_path_factory)


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same with 36 tokens per image."""
    return tiny.write_model(tmp_path_factory, image_size=84)


@pytest.fixture(scope="session")
def model(small_model: Any) -> Any:
    return small_model


@pytest.fixture
def fitting_model(small_model: Any, wide_model: Any, request: pytest.FixtureRequest) -> Any:
    """The one of the two that suits the method `name` that a test is about."""
    return {4: small_model, 6: wide_model}[tiny.grid_for(request)]
