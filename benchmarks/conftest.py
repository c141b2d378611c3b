"""Of the regression tests only: one thread, and the option that measures their ratios anew."""

import pytest
import torch

torch.set_num_threads(1)  # the same on every machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--save-ratios", action="store_true", help="write results/ratios.json, instead of testing it")
