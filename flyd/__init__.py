"""flyd: the daemon, its API and the `fly` command.

Nothing here uses gRPC in a child that it forks; children are begun to run another program. gRPC's handlers
for a fork, which are on by default, run in each such child that becomes another user, and crash it while
other threads use gRPC. They are off for whoever imports this package, before gRPC begins.
"""

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
