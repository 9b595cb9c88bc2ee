"""Every byte layout that Python shares with device code or C, floor 1: `from concordia import abi`
has all of it.
"""

# ruff: noqa: F403 - the rooms' names are this package's, and listing ninety of them twice would
# only let the lists differ
from concordia.abi.c_header import *
from concordia.abi.control_layout import *
from concordia.abi.journal_layout import *
from concordia.abi.numbers import *
from concordia.abi.ring_layout import *
from concordia.abi.structure import *
