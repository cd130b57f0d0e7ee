"""Whether this machine can run the framework well: facts that are tried, not guessed, then tables.

`examine` collects, `tables` lays out; neither prints. A part that fails gives its reason and ends
nothing: only what training cannot do without is `broken`.
"""

from hdit.doctor.examination import examine
from hdit.doctor.facts import Diagnosis
from hdit.doctor.tables import tables

__all__ = ["Diagnosis", "examine", "tables"]
