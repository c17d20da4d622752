"""The tests' fixtures, for the benchmarks: where the real films are, and the rules of the markers."""

import importlib.util
from pathlib import Path

# by its path: both files are called conftest
_spec = importlib.util.spec_from_file_location("tests_conftest", Path(__file__).parents[1] / "tests" / "conftest.py")
assert _spec is not None and _spec.loader is not None
_tests = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_tests)
data, films, isa = _tests.data, _tests.films, _tests.isa
pytest_runtest_setup = _tests.pytest_runtest_setup
