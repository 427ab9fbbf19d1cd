"""The two kinds of `updraft.dev/v1alpha1`, as models: the one source of the CRDs, of the reference, and of what is read."""
