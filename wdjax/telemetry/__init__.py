"""Metrics of weight decay, measured during the step: the sizes of weights, updates and decay, by group.

`monitor` wraps a finished optimizer, changes nothing, and keeps a few scalars for each group of parameters in its
state. `scalars` reads them from any state that holds the monitor.

An update does not show which part of it is decay. The decays of wdjax tell: `_engine.probe` says how. Any other decay
the monitor computes from its arguments. For each array, one fused reduction (`_sums`) sums a few products of parameter,
update and decay. All metrics are arithmetic on these sums.
"""

from ._monitor import MonitorState as MonitorState
from ._monitor import monitor as monitor
from ._scalars import scalars as scalars
from ._sums import METRICS as METRICS
