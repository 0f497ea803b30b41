"""What tests of reports share."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from ebwm_scale import report
from ebwm_scale.config.schema import Config
from ebwm_scale.core.errors import UserError
from ebwm_scale.core.rows import MAX_LINE, Rows
from ebwm_scale.report import main, write_report
from ebwm_scale.reporting import report_page
from ebwm_scale.reporting.curves import POINTS, read_metrics
from ebwm_scale.reporting.plots import (
    Plot,
    draw_profile,
    draw_training_loss,
    draw_validation,
)
from ebwm_scale.reporting.read_run import read_run
from ebwm_scale.reporting.style import PALETTE
from ebwm_scale.train import report_in_words


@pytest.fixture
def without_plots(monkeypatch):
    """Drawing takes seconds; promises about the words on the page do not need it."""
    empty = Plot("plot", "caption", None)
    monkeypatch.setattr(report_page, "report_plots", lambda run, baseline: (empty, [empty]))
    monkeypatch.setattr(report, "headline_png", lambda run, baseline: b"")
