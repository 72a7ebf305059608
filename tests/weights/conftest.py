# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Fixtures that tests of weights share."""

import logging

import pytest


@pytest.fixture
def lines(caplog):
    """Messages of the toolkit's logger."""
    logger = logging.getLogger("convnextv2")
    before = logger.propagate, logger.level
    logger.propagate = True
    caplog.set_level(logging.INFO, logger="convnextv2")
    yield lambda: [record.getMessage() for record in caplog.records]
    logger.propagate = before[0]
    logger.setLevel(before[1])
