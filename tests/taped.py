"""The `bertfast` command with a tape for graphs on a CPU: for tests that start it as a process."""

import sys

from tape import Tape

from bertfast.cli import main
from bertfast.encoder import graph

if __name__ == "__main__":
    graph.RECORDERS["cpu"] = Tape
    sys.exit(main())
