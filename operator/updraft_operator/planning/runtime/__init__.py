"""Runtimes: what this operator makes of a spec, and when pods that an older one made follow."""
