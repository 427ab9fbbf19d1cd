"""The command line of Updraft."""

import os

# Read once, when gRPC's C core is imported, which is later than this. Its own lines about refused connections would stand
# beside the sentence that we print for them.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
