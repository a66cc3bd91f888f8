"""What a run needs before it is begun: values, memory, bytes and seconds on a link, from shapes alone.

Nothing is trained and no weights are made: the parts are traced with shapes and dtypes, and each figure is a formula
over what the library itself counts with, `RunSpec`, `split.traffic`, `Codec.payload_bytes`. `msjax plan` prints it.
"""

from msjax.plan._link import Link, Row, Sent, alternatives, sent, with_codecs
from msjax.plan._memory import (
    Needs,
    lowered_bytes,
    nbytes,
    needs,
    operations,
    sample_activation_bytes,
    state_needs,
    values,
)
from msjax.plan._plan import Plan, plan
from msjax.plan._run import (
    UNKNOWN_STEPS,
    Counts,
    Run,
    describe_data,
    describe_elsewhere,
    describe_known_data,
    describe_run,
)

__all__ = [
    "UNKNOWN_STEPS",
    "Counts",
    "Link",
    "Needs",
    "Plan",
    "Row",
    "Run",
    "Sent",
    "alternatives",
    "describe_data",
    "describe_elsewhere",
    "describe_known_data",
    "describe_run",
    "lowered_bytes",
    "nbytes",
    "needs",
    "operations",
    "plan",
    "sample_activation_bytes",
    "sent",
    "state_needs",
    "values",
    "with_codecs",
]
